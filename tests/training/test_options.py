"""Options of a training: what they are resolved to, where they change nothing, and where they can't be had."""

import json

import attrs
import pytest
import torch
from support import Silent, quantization

from quantune.checkpoint.run_folder import RunFolder
from quantune.errors import InputError, ModelError
from quantune.model import adapter
from quantune.model.activations import offload, offloading, recompute_blocks
from quantune.model.base import open_base, skeleton
from quantune.model.compilation import compile_blocks
from quantune.model.device import tf32
from quantune.model.load import load_model
from quantune.recipe.schema import (
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    Recipe,
    SourceConfig,
    TrainingConfig,
)
from quantune.training.answer import answer
from quantune.training.loss import build_loss
from quantune.training.optimizer import build_optimizer, set_learning_rate
from quantune.training.resolve import resolve, without_effect
from quantune.training.run import train

CPU = torch.device("cpu")
NOWHERE = SourceConfig(path="nowhere.jsonl", format="completion")


def recipe(*, model=None, source=NOWHERE, **training):
    return Recipe(
        model=ModelConfig(base="builtin:mini", **(model or {})),
        adapter=AdapterConfig(r=4),
        data=DataConfig(train=(source,)),
        training=TrainingConfig(**{"batch_size": 4, **training}),
    )


def run(made, folder, observer=None):
    with RunFolder.open(folder, "new") as opened:
        return train(made, opened, observer or Silent())


@pytest.mark.parametrize(
    ("samples", "per_epoch", "every"), [(100, 1, 25), (100, 2, 13), (101, 1, 26), (100, 25, 1), (100, 80, 1), (3, 1, 1)]
)
def test_a_count_per_epoch_becomes_steps_and_never_more_of_them_than_asked_for(samples, per_epoch, every):
    made = attrs.evolve(
        recipe(epochs=3.0),
        evaluation=EvaluationConfig(per_epoch=per_epoch),
        checkpoint=CheckpointConfig(per_epoch=per_epoch),
    )
    resolved = resolve(made, device=CPU, sample_count=samples, longest=10)
    for table in (resolved.evaluation, resolved.checkpoint):
        assert (table.every_steps, table.per_epoch) == (every, None)
    steps_of_an_epoch = samples / 4
    assert steps_of_an_epoch / every <= per_epoch


def test_a_warm_up_longer_than_the_run_is_refused_with_the_numbers():
    with pytest.raises(InputError, match=r"warm-up of 30 steps .* the run's 25 steps \(100 samples, 4 a step\)"):
        resolve(recipe(warmup_steps=30), device=CPU, sample_count=100, longest=10)
    assert resolve(recipe(warmup_steps=24), device=CPU, sample_count=100, longest=10).training.warmup_steps == 24


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "no every_steps"),
        ({"every_steps": 26}, "every_steps = 26"),
        ({"per_epoch": 1}, "per_epoch = 1, which is every 26 steps"),
    ],
)
def test_evaluation_data_that_no_evaluation_comes_up_for_is_refused(keys, said):
    made = recipe(max_steps=25)
    made = attrs.evolve(made, data=attrs.evolve(made.data, eval=(NOWHERE,)))
    never = attrs.evolve(made, evaluation=EvaluationConfig(at_end=False, **keys))
    with pytest.raises(InputError, match=rf"never evaluated in a run of 25 steps with .*{said}"):
        resolve(never, device=CPU, sample_count=101, longest=10)
    for more in ({"at_end": True}, {"at_start": True}, {"every_steps": 25, "per_epoch": None}):
        fine = attrs.evolve(never, evaluation=attrs.evolve(never.evaluation, **more))
        assert resolve(fine, device=CPU, sample_count=100, longest=10).evaluation.per_epoch is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_run_of_a_gpu_answers_on_a_cpu_with_the_attention_there_is():
    made = recipe(model={"attn_implementation": "flash_attention_3"}, device="cuda", precision="fp32")
    assert len(answer(made, None, ["March"], max_new_tokens=1)) == 1


def test_a_resolved_recipe_resolves_to_itself():
    made = recipe(tf32=True, activation_checkpointing="offload", warmup_ratio=0.9)
    made = attrs.evolve(made, checkpoint=CheckpointConfig(per_epoch=2))
    once = resolve(made, device=CPU, sample_count=10, longest=10)
    assert resolve(once, device=CPU, sample_count=10, longest=10) == once
    assert without_effect(once, CPU) == []


def test_what_only_a_gpu_makes_use_of_is_reported_and_resolved_away_on_a_cpu():
    made = recipe(tf32=True, activation_checkpointing="offload")
    assert [sentence.split()[1] for sentence in without_effect(made, CPU)] == [
        "tf32",
        "activation_checkpointing",
    ]
    resolved = resolve(made, device=CPU, sample_count=10, longest=10).training
    assert (resolved.tf32, resolved.activation_checkpointing) == (False, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU both have an effect")
def test_a_run_warns_of_what_has_no_effect(tmp_path):
    class Listening(Silent):
        def __init__(self):
            self.warnings = []

        def warning(self, text):
            self.warnings.append(text)

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"The number {n}."}) + "\n" for n in range(4)))
    source = SourceConfig(path=str(rows), format="completion")
    observer = Listening()
    made = recipe(source=source, max_steps=1, tf32=True, activation_checkpointing="offload")
    made = attrs.evolve(made, quantization=attrs.evolve(quantization(), experts=False))
    run(made, tmp_path / "run", observer)
    for key in ("tf32", "offload", "experts = false has no effect"):
        assert any(key in text for text in observer.warnings)
    written = (tmp_path / "run" / "recipe.toml").read_text()
    assert "tf32 = false" in written and "activation_checkpointing = true" in written


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (recipe(optimizer="paged_adamw"), InputError, 'on a CPU; use optimizer = "adamw"'),
        (recipe(optimizer="paged_adamw_8bit"), InputError, 'on a CPU; use optimizer = "adamw_8bit"'),
        (recipe(model={"attn_implementation": "flex_attention"}), ModelError, 'use "auto", "sdpa" or "eager"'),
        (recipe(model={"attn_implementation": "flash_attention_2"}), ModelError, "trains on a GPU only"),
        (recipe(model={"attn_implementation": "flash_attention_3"}), ModelError, "trains on a GPU only"),
    ],
)
def test_what_needs_a_gpu_is_refused_on_a_cpu_before_anything_is_read(tmp_path, made, error, message):
    made = attrs.evolve(made, training=attrs.evolve(made.training, device="cpu"))
    with pytest.raises(error, match=message):
        run(made, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "package"), [("flash_attention_2", "flash-attn"), ("flash_attention_3", "flash-attn-3")]
)
def test_an_attention_whose_package_is_missing_is_refused_with_the_package(name, package):
    base = open_base(ModelConfig(base="builtin:mini", attn_implementation=name))
    with pytest.raises(
        ModelError, match=f'attn_implementation = "{name}" can\'t be used.*install the package {package}'
    ):
        skeleton(base)


def test_tf32_is_allowed_inside_its_context_and_whatever_it_was_before_afterwards():
    before = torch.get_float32_matmul_precision()
    with tf32(False):
        assert torch.get_float32_matmul_precision() == before
    with pytest.raises(RuntimeError, match="stop"), tf32(True):
        assert torch.get_float32_matmul_precision() == "high"
        raise RuntimeError("stop")
    assert torch.get_float32_matmul_precision() == before


TOKENS = torch.arange(48).view(2, 24) * 7 % 4000


def adapted(device=CPU, dropout=0.1):
    base = open_base(ModelConfig(base="builtin:mini"))
    packing = quantization(backend="bnb", weight_dtype="nf4")
    model = load_model(base, packing, compute_dtype=torch.float32, device=device)
    model = adapter.attach(model, AdapterConfig(r=4, dropout=dropout), base_name="mini", seed=1).train()
    return model, build_loss(model.get_base_model())


def gradients(model, loss):
    torch.manual_seed(3)  # dropout
    value = loss(TOKENS.to(model.device), TOKENS.to(model.device))
    value.backward()
    found = {name: parameter.grad for name, parameter in adapter.trainable_parameters(model).items()}
    model.zero_grad(set_to_none=True)
    return float(value.detach()), found


def test_offloaded_inputs_give_the_gradients_of_those_that_stay():
    model, loss = adapted()
    recompute_blocks(model.get_base_model())
    value, expected = gradients(model, loss)
    again, found = gradients(model, offloading(loss, model))
    assert again == value
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


def test_the_inputs_of_every_block_are_offloaded_and_no_weight_is():
    model, loss = adapted()
    recompute_blocks(model.get_base_model())
    hooks, packed = offload(model), []
    spying = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: packed.append((tensor, hooks.pack_hook(tensor))) or packed[-1][1], hooks.unpack_hook
    )
    with spying:
        value = loss(TOKENS, TOKENS)
    value.backward()
    moved = [tensor.shape for tensor, held in packed if isinstance(held, tuple)]
    assert moved.count(torch.Size([2, 24, 256])) >= 4  # one for each block
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    stayed = [tensor for tensor, held in packed if not isinstance(held, tuple)]
    assert any(tensor.data_ptr() in weights for tensor in stayed)
    assert all(tensor.data_ptr() in weights or not tensor.is_floating_point() for tensor in stayed)


def test_compiled_blocks_offload_their_inputs_too():
    torch._dynamo.reset()
    model, loss = adapted(dropout=0.0)  # compiled code draws random numbers in an order of its own
    value, expected = gradients(model, loss)
    recompute_blocks(model.get_base_model())
    compile_blocks(model.get_base_model(), backend="aot_eager", whole=True)
    hooks, moved = offload(model), []
    spying = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: moved.append(hooks.pack_hook(tensor)) or moved[-1], hooks.unpack_hook
    )

    def spied(input_ids, labels):
        with spying:
            return loss(input_ids, labels)

    again, found = gradients(model, spied)
    assert again == pytest.approx(value, rel=1e-5)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    held = [kept[1] for kept in moved if isinstance(kept, tuple)]
    assert sum(tensor.shape == (2, 24, 256) for tensor in held) >= 4
    assert not any(tensor.data_ptr() in weights for tensor in held)


def test_an_architecture_that_can_not_recompute_is_refused():
    model, _ = adapted()
    plain = model.get_base_model()
    plain.supports_gradient_checkpointing = False
    with pytest.raises(ModelError, match="LlamaForCausalLM does not support it"):
        recompute_blocks(plain)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
def test_offloading_on_a_gpu_holds_less_and_computes_the_same():
    model, loss = adapted(torch.device("cuda"))
    recompute_blocks(model.get_base_model())
    value, expected = gradients(model, loss)
    again, found = gradients(model, offloading(loss, model))
    assert again == value
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name
    held = []
    for choice in (loss, offloading(loss, model)):
        before = torch.cuda.memory_allocated()
        kept = choice(TOKENS.cuda(), TOKENS.cuda())
        held.append(torch.cuda.memory_allocated() - before)
        del kept
    assert held[1] < held[0] / 2


@needs_gpu
@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_a_paged_optimizer_steps_on_a_gpu(name):
    parameter = torch.nn.Parameter(torch.randn(512, 512, device="cuda"))
    optimizer = build_optimizer({"weight": parameter}, TrainingConfig(optimizer=name, learning_rate=1e-2))
    before = parameter.detach().clone()
    parameter.grad = torch.randn_like(parameter)
    set_learning_rate(optimizer, 1e-2)
    optimizer.step()
    assert not torch.equal(parameter, before) and optimizer.state[parameter]["state1"].is_paged
