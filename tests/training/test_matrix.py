"""Everything works on everything: every format with every kind of training, on the built-in model.

Whole runs with evaluation, generation, checkpoints and a resume stand first; then what each feature promises, format by
format: the same numbers as without it where it must not change them, a gradient for everything that is trained.
"""

import json
import shutil

import attrs
import pytest
import torch
from support import FORMATS, Silent, quantization

from quantune.checkpoint.run_folder import RunFolder
from quantune.model import adapter
from quantune.model.base import open_base, skeleton
from quantune.model.compilation import compile_blocks, suspended
from quantune.model.load import load_model
from quantune.recipe.schema import (
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OutputConfig,
    Recipe,
    SourceConfig,
    TrainingConfig,
)
from quantune.training.evaluate import generate
from quantune.training.loss import build_loss
from quantune.training.optimizer import build_optimizer, set_learning_rate
from quantune.training.run import train

CPU = torch.device("cpu")
STEPS = 12
CLOSE = {
    "bnb nf4": 0.06,
    "bnb fp4": 0.12,
    "bnb int8": 0.01,
    "torchao int4": 0.05,
    "torchao nf4": 0.05,
    "torchao nvfp4": 0.05,
    "torchao int8": 0.01,
    "torchao fp8": 0.05,
    "mxfp4": 0.07,
    "fp8": 0.03,
}
"""How far a format's training losses may be from the unquantized run's: mean relative difference over all steps."""
every_format = pytest.mark.parametrize("name", FORMATS)


def recipe(folder, name, **changes):
    source = SourceConfig(path=str(folder / "train.jsonl"), format="chat")
    made = Recipe(
        model=ModelConfig(base="builtin:mini"),
        quantization=None if name is None else quantization(**FORMATS[name]),
        adapter=AdapterConfig(r=8),
        data=DataConfig(train=(source,), eval=(attrs.evolve(source, limit=3),)),
        training=TrainingConfig(max_steps=STEPS, batch_size=4, learning_rate=1e-3, precision="fp32"),
        evaluation=EvaluationConfig(exact_match=True, max_new_tokens=3),
        checkpoint=CheckpointConfig(every_steps=STEPS // 2),
        output=OutputConfig(dir=str(folder)),
    )
    return attrs.evolve(made, **changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a few conversations."""
    folder = tmp_path_factory.mktemp("matrix")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What comes after {n}?"},
                {"role": "assistant", "content": f"After {n} comes {n + 1}."},
            ]
        }
        for n in range(32)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(made, folder, *, resume=False):
    with RunFolder.open(folder, "resume" if resume else "new") as opened:
        return train(made, opened, Silent(), resume=resume)


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row["loss"] for row in rows if row["event"] == "step"])


@pytest.fixture(scope="module")
def unquantized(data):
    """The losses of the run on the base as it is."""
    run(recipe(data, None), data / "unquantized")
    return losses(data / "unquantized")


@every_format
def test_a_run_learns_like_the_unquantized_one_evaluates_generates_and_resumes(data, unquantized, name):
    folder = data / name.replace(" ", "-")
    made = recipe(data, name)
    result = run(made, folder)
    found = losses(folder)
    assert ((found - unquantized).abs() / unquantized).mean() < CLOSE[name]
    assert found[-3:].mean() < 0.6 * found[0]
    assert result.evaluations[-1].exact_match is not None and result.evaluations[-1].loss < float(found[0])

    before = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08d}")
    shutil.rmtree(folder / "adapter")
    (folder / "status.json").write_text('{"state": "interrupted", "step": 6}')
    run(made, folder, resume=True)
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert torch.equal(losses(folder), found)


@pytest.fixture(scope="module")
def base():
    """The built-in base, cut to two of its layers."""
    return open_base(ModelConfig(base="builtin:mini", config={"num_hidden_layers": 2}))


TOKENS = torch.arange(48).view(2, 24) * 7 % 4000
ADAPTERS = {
    "lora": AdapterConfig(r=4),
    "rslora": AdapterConfig(r=4, use_rslora=True),
    "dora": AdapterConfig(r=4, use_dora=True),
    "dropout": AdapterConfig(r=4, dropout=0.2),
    "dora and dropout": AdapterConfig(r=4, use_dora=True, dropout=0.2),
    "head saved": AdapterConfig(r=4, modules_to_save=("lm_head",)),
    "pissa": AdapterConfig(r=4, init="pissa"),
    "olora": AdapterConfig(r=4, init="olora"),
    "loftq": AdapterConfig(r=4, init="loftq", loftq_iterations=2),
    "gaussian": AdapterConfig(r=4, init="gaussian"),
    "biases": AdapterConfig(r=4, bias="lora_only"),
}


def build(base, name, config):
    """The packed base with a fresh adapter, in training mode, and its loss."""
    split = adapter.build_initialization(skeleton(base), config, seed=1)
    model = load_model(
        base, quantization(**FORMATS[name]), compute_dtype=torch.float32, device=CPU, initialization=split
    )
    model = adapter.attach(model, config, base_name="mini", seed=1, initialization=split).train()
    return model, build_loss(model.get_base_model())


def gradients(model, loss):
    """The loss, and every gradient by name."""
    torch.manual_seed(3)  # dropout
    value = loss(TOKENS, TOKENS)
    value.backward()
    found = {name: parameter.grad for name, parameter in adapter.trainable_parameters(model).items()}
    model.zero_grad(set_to_none=True)
    return float(value.detach()), found


@every_format
@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
def test_every_adapter_gets_its_gradients_and_a_step_lowers_the_loss(base, name, config):
    model, loss = build(base, name, config)
    first, found = gradients(model, loss)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found.values())
    assert sum(gradient.abs().sum() > 0 for gradient in found.values()) >= len(found) / 2  # B = 0 hides A's at first
    parameters = adapter.trainable_parameters(model)
    optimizer = build_optimizer(parameters, TrainingConfig(learning_rate=5e-4, loraplus_lr_ratio=2.0))
    set_learning_rate(optimizer, 5e-4)
    for parameter, gradient in zip(parameters.values(), found.values(), strict=True):
        parameter.grad = gradient
    optimizer.step()
    assert gradients(model, loss)[0] < first


@every_format
@pytest.mark.parametrize("adapted", ["lora", "dora and dropout"])
def test_activation_checkpointing_changes_nothing(base, name, adapted):
    model, loss = build(base, name, ADAPTERS[adapted])
    value, expected = gradients(model, loss)
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, found = gradients(model, loss)
    assert again == value
    for key, gradient in found.items():
        assert torch.equal(gradient, expected[key])


@pytest.mark.parametrize(("name", "adapted"), [*((name, "lora") for name in FORMATS), ("mxfp4", "dora and dropout")])
def test_blocks_compile_into_one_graph_without_breaks(base, name, adapted):
    """`fullgraph` makes a break an error; the graph itself is run as it is, so that the numbers can be compared."""
    torch._dynamo.reset()
    model, loss = build(base, name, ADAPTERS[adapted])
    if adapted != "lora":
        model.eval()  # the order in which compiled code draws random numbers is its own
    value, expected = gradients(model, loss)
    compile_blocks(model.get_base_model(), backend="aot_eager", whole=True)
    again, found = gradients(model, loss)
    assert again == pytest.approx(value, rel=1e-5)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-3, atol=1e-5)
    model.eval()
    prompt = TOKENS[:1, :6]
    with suspended(True):
        (text,) = generate(model, prompt, torch.ones_like(prompt), base.tokenizer, max_new_tokens=2, pad_id=base.pad_id)
    assert isinstance(text, str)


@pytest.mark.slow
def test_compiled_code_computes_the_same(base):
    """The real compiler, once: what it makes of the operators does not depend on the format."""
    torch._dynamo.reset()
    model, loss = build(base, "torchao int4", ADAPTERS["lora"])
    value, expected = gradients(model, loss)
    compile_blocks(model.get_base_model(), whole=True)
    again, found = gradients(model, loss)
    assert again == pytest.approx(value, rel=1e-4)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_a_compiled_run_trains_evaluates_and_ends_like_one_that_is_not(data):
    made = recipe(data, "torchao int8")
    shorter = attrs.evolve(made.training, max_steps=4)
    run(attrs.evolve(made, training=shorter), data / "eager")
    result = run(attrs.evolve(made, training=attrs.evolve(shorter, compile=True)), data / "compiled-run")
    torch.testing.assert_close(losses(data / "compiled-run"), losses(data / "eager"), rtol=1e-3, atol=1e-3)
    assert result.evaluations[-1].exact_match is not None


def test_compiling_without_a_compiler_is_refused_before_anything_is_read(data, monkeypatch):
    from quantune.errors import InputError

    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "nothing")
    made = recipe(data, "mxfp4")
    compiled = attrs.evolve(made, training=attrs.evolve(made.training, compile=True, device="cpu"))
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler"):
        run(compiled, data / "compiled")
