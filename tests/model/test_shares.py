"""Loading a model that ranks share: each ends up with its share of exactly what one process would hold."""

from datetime import timedelta

import pytest
import torch
from model.test_adoption import opened
from ranks import on_ranks
from support import base_of, quantization
from torch.distributed.tensor import DTensor

from quantune.distributed.sharding import Root, shard
from quantune.distributed.shares import Shares, gathered
from quantune.distributed.world import World, joined
from quantune.errors import QuantizationError
from quantune.model import adapter
from quantune.model.compilation import compile_blocks
from quantune.model.load import load_model, packed_fingerprint
from quantune.recipe.schema import AdapterConfig
from quantune.training.loss import build_loss

CPU = torch.device("cpu")
TOKENS = torch.arange(24).view(2, 12)
BASES = ["llama", "tied_llama", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "gpt_oss_mxfp4", "deepseek_fp8"]
STORED = {"gpt_oss_mxfp4": {"backend": "mxfp4"}, "deepseek_fp8": {"backend": "fp8"}}


@pytest.fixture(params=BASES)
def stored(request):
    """A base and how it is to be stored."""
    name = request.param
    if name in STORED:
        return opened(request.getfixturevalue(name)), quantization(**STORED[name])
    folder = request.getfixturevalue("mixtures")[name] if "llama" not in name else request.getfixturevalue(name)
    return base_of(folder), quantization(weight_dtype="nf4")


def load(base, plan, shares=None):
    return load_model(base, plan, compute_dtype=torch.float32, device=CPU, shares=shares)


def _state(world, base, plan, skip=()):
    with joined(world, CPU, timedelta(seconds=60)) as mesh:
        model = load(base, plan, Shares(world=world, mesh=mesh, device=CPU))
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or parameter.dtype == torch.uint8:
                assert isinstance(parameter, DTensor), name
                assert parameter.to_local().shape[0] <= -(-parameter.shape[0] // world.size)
        whole = {name: gathered(value).clone() for name, value in model.state_dict().items()}
        return whole if world.main else None, packed_fingerprint(model)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_together_hold_what_one_process_holds(stored, size):
    base, plan = stored
    alone = load(base, plan)
    (found, fingerprint), *others = on_ranks(size, _state, base, plan)
    expected = alone.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert {fingerprint, *(other for _, other in others)} == {packed_fingerprint(alone)}


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_an_unquantized_base_is_shared_too(request, mixtures, name):
    base = base_of(mixtures[name] if name in mixtures else request.getfixturevalue(name))
    (found, _), _ = on_ranks(2, _state, base, None)
    for name, value in load(base, None).state_dict().items():
        assert torch.equal(found[name], value), name


def _losses(world, base, plan, config, backend=None):
    alone = world.size == 1
    with joined(world, CPU, timedelta(seconds=60)) as mesh:
        shares = None if mesh is None else Shares(world=world, mesh=mesh, device=CPU)
        inner = load(base, plan, shares)
        root = Root(adapter.attach(inner, config, base_name="", seed=0))
        if backend is not None:
            compile_blocks(inner, backend)
        if mesh is not None:
            shard(root, mesh, CPU)
        loss = root(build_loss, inner)
        optimizer = torch.optim.SGD(adapter.trainable_parameters(root.model).values(), lr=1.0)
        losses = []
        for _ in range(4):
            own = TOKENS if alone else TOKENS[world.rank :: world.size]
            found = root(loss, own, own) / TOKENS.numel()
            found.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(sum(row[0] for row in world.gather_numbers([found.item()])))
        return losses


@pytest.mark.parametrize("base", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_adapters_on_experts_train_the_same_on_two_ranks(mixtures, base):
    base = base_of(mixtures[base])
    config = AdapterConfig(r=4, targets=(), target_parameters=("experts.gate_up_proj", "experts.down_proj"))
    plan = quantization(weight_dtype="nf4")
    alone = _losses(World(), base, plan, config)
    first, second = on_ranks(2, _losses, base, plan, config)
    assert first == second == pytest.approx(alone, rel=1e-5)
    assert alone[-1] < alone[0] * 0.999


@pytest.mark.slow
def test_compiled_blocks_train_the_same_on_two_ranks(llama):
    plan, config, base = quantization(weight_dtype="nf4"), AdapterConfig(r=4), base_of(llama)
    base.config.num_hidden_layers = 1  # each is compiled on its own
    alone = _losses(World(), base, plan, config)
    first, second = on_ranks(2, _losses, base, plan, config, "aot_eager")
    assert first == second == pytest.approx(alone, rel=1e-5)


def _fails_on_one(world, base, plan):
    from quantune.model.quantizer import QuantizationPlan

    pack = QuantizationPlan.pack

    def fails(self, weight, name):
        if world.rank == 1:
            raise QuantizationError("this weight is bad")
        return pack(self, weight, name)

    QuantizationPlan.pack = fails  # in this forked process alone
    with joined(world, CPU, timedelta(seconds=60)) as mesh:
        try:
            load(base, plan, Shares(world=world, mesh=mesh, device=CPU))
        except QuantizationError as error:
            return str(error)


def test_a_weight_that_one_rank_cannot_pack_fails_the_load_on_all(llama):
    first, second = on_ranks(2, _fails_on_one, base_of(llama), quantization(weight_dtype="nf4"))
    assert second == "this weight is bad"
    assert first.startswith("rank 1 could not pack model.layers.0.") and first.endswith("this weight is bad")
