"""Packing changes where samples stand and nothing that is learned; a model that would mix them is refused."""

import json
import shutil

import attrs
import pytest
import torch
import transformers
from torch import nn

from quantune.checkpoint.run_folder import RunFolder
from quantune.data.collate import collate
from quantune.data.dataset import Counts, Dataset
from quantune.data.packing import pack
from quantune.data.tokenization import Sample
from quantune.errors import ModelError
from quantune.model import adapter
from quantune.model.activations import offloading, recompute_blocks
from quantune.model.base import open_base
from quantune.model.compilation import compile_blocks
from quantune.model.load import load_model
from quantune.recipe.schema import (
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OutputConfig,
    Recipe,
    SourceConfig,
    TrainingConfig,
)
from quantune.training.loss import LanguageModelLoss, WholeLogitsLoss, build_loss
from quantune.training.observer import SilentObserver
from quantune.training.packed_rows import RowLayout, layout_for
from quantune.training.run import train

CPU = torch.device("cpu")
LENGTHS = (7, 3, 12, 5, 9, 2, 16, 4)
ROOM = 16
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts_per_tok": 2, "head_dim": 8}


def model_of(name, attention="sdpa", **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **more, attn_implementation=attention)
    made = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in made.parameters():
        if parameter.dim() > 1:  # large enough to tell samples apart by
            nn.init.normal_(parameter, std=0.2)
    return made.eval()


def samples(vocabulary=96):
    torch.manual_seed(2)
    made = []
    for index, length in enumerate(LENGTHS):
        is_target = (torch.rand(length) < 0.7).numpy()
        is_target[0], is_target[-1] = False, True
        ids = torch.randint(0, vocabulary, (length,), dtype=torch.int32).numpy()
        made.append(Sample(input_ids=ids, is_target=is_target, where=f"d:{index}", prompt_length=0))
    return Dataset(samples=tuple(made), counts=Counts())


def value_and_gradients(model, loss, batches, layout):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = sum(loss(*layout.arrange(batch, CPU)) for batch in batches)
    return total.detach(), torch.autograd.grad(total, parameters, allow_unused=True)


KEEP_APART = {
    "llama": ("Llama", {}),
    "llama eager": ("Llama", {"attention": "eager"}),
    "gemma 2": ("Gemma2", {"attention": "eager", "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 5.0}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "gpt-oss": ("GptOss", {"num_local_experts": 4, **EXPERTS, "sliding_window": 4, "attention": "eager"}),
}


@pytest.mark.parametrize(("name", "more"), KEEP_APART.values(), ids=KEEP_APART)
def test_packed_rows_have_the_loss_and_the_gradients_of_their_samples(name, more):
    model = model_of(name, **more)
    loss, layout, dataset = build_loss(model), layout_for(model), samples()
    packed = pack(dataset, ROOM, keep_order=False)
    assert len(packed.samples) < len(LENGTHS)
    expected, wanted = value_and_gradients(model, loss, [collate([s], 0) for s in dataset.samples], RowLayout())
    for pad_to in (0, 24):
        found, gradients = value_and_gradients(model, loss, [collate(packed.samples, 0, pad_to)], layout)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        for one, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


def test_an_architecture_that_does_not_hand_its_positions_on_is_given_masks():
    """Once transformers hands gpt-oss' positions on, this way is not needed any more."""
    name, more = KEEP_APART["gpt-oss"]
    assert layout_for(model_of(name, **more)).masks_of is not None
    assert layout_for(model_of("Llama")).masks_of is None


def test_rows_laid_end_to_end_are_the_same_samples():
    """As flash attention needs them, which no CPU has."""
    model = model_of("Llama")
    loss, packed = build_loss(model), pack(samples(), ROOM, keep_order=True)
    batch = collate(packed.samples, 0)
    expected = loss(*RowLayout().arrange(batch, CPU))
    torch.testing.assert_close(loss(*RowLayout(one_row=True).arrange(batch, CPU)), expected)
    torch.testing.assert_close(WholeLogitsLoss(model=model)(*RowLayout().arrange(batch, CPU)), expected)


MIX = {
    "mamba": ("Mamba", {"state_size": 4}),
    "recurrentgemma": ("RecurrentGemma", {"lru_width": 32, "attention_window_size": 32}),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "qwen3-next": (
        "Qwen3Next",
        {
            **EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "bloom": ("Bloom", {"attention": "eager"}),
}


@pytest.mark.parametrize(("name", "more"), MIX.values(), ids=MIX)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_carries_one_sample_into_the_next_is_refused(name, more, dtype):
    more = {"attention": None, **more}
    model = model_of(name, **more).to(dtype).train()
    with pytest.raises(ModelError, match=f"{name}ForCausalLM does not keep them apart: .*Set packing = false"):
        layout_for(model)
    assert model.training


@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_rounding_is_no_reason_to_refuse(name):
    assert layout_for(model_of(name).to(torch.bfloat16)).masks_of is None


def build(**config):
    base = open_base(ModelConfig(base="builtin:mini"))
    model = load_model(base, None, compute_dtype=torch.float32, device=CPU)
    model = adapter.attach(model, AdapterConfig(r=4, **config), base_name="mini", seed=1).train()
    for name, parameter in adapter.trainable_parameters(model).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model, build_loss(model.get_base_model())


@pytest.mark.parametrize("option", ["compile", "activation_checkpointing", "offload"])
def test_compiled_and_checkpointed_blocks_keep_samples_apart_too(option):
    model, loss = build()
    layout, dataset = layout_for(model.get_base_model()), samples(4000)
    batches = [collate([sample], 0) for sample in dataset.samples]
    expected, wanted = value_and_gradients(model, loss, batches, RowLayout())
    if option == "compile":
        compile_blocks(model.get_base_model(), backend="eager")
    else:
        recompute_blocks(model.get_base_model())
        loss = offloading(loss, model.get_base_model()) if option == "offload" else loss
    packed = pack(dataset, ROOM, keep_order=True).samples
    batches = [collate(packed[start : start + 2], 0, ROOM) for start in range(0, len(packed), 2)]
    found, gradients = value_and_gradients(model, loss, batches, layout)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


@pytest.fixture
def data(tmp_path):
    """A folder with conversations of several lengths."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What comes after {n}?" + " Please." * (n % 7)},
                {"role": "assistant", "content": str(n + 1)},
            ]
        }
        for n in range(40)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


class Heard(SilentObserver):
    """Keeps the counts of the data."""

    def __init__(self):
        self.counts = {}

    def data(self, name, counts):
        self.counts[name] = counts


def run(folder, name, *, resume=False, dropout=0.1, steps=6, **data):
    source = SourceConfig(path=str(folder / "train.jsonl"), format="chat")
    made = Recipe(
        model=ModelConfig(base="builtin:mini"),
        adapter=AdapterConfig(r=4, dropout=dropout),
        data=DataConfig(train=(source,), **{"max_length": 64, **data}),
        training=TrainingConfig(max_steps=steps, batch_size=4, learning_rate=1e-3, precision="fp32"),
        checkpoint=CheckpointConfig(every_steps=3),
        output=OutputConfig(dir=str(folder / name)),
    )
    heard = Heard()
    with RunFolder.open(folder / name, "resume" if resume else "new") as opened:
        result = train(made, opened, heard, resume=resume)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "step"], heard.counts, result


def test_a_packed_run_holds_out_counts_rows_and_resumes_with_the_same_bytes(data):
    steps, counts, result = run(data, "packed", packing=True, eval_size=0.1)
    train_counts = counts["train"]
    assert (train_counts.kept, train_counts.held_out, counts["eval"].kept) == (36, 4, 4)
    assert result.evaluations[-1].samples == 4
    assert train_counts.packed_rows < 20 and train_counts.fill > 0.8
    assert sum(step["tokens"] for step in steps[: train_counts.packed_rows // 4]) <= train_counts.tokens
    assert all(step["tokens"] > 4 * 64 * 0.5 for step in steps)
    assert steps[0]["epoch"] == pytest.approx(4 / train_counts.packed_rows)
    manifest = json.loads((data / "packed" / "manifest.json").read_text())
    assert manifest["data"]["train"] == attrs.asdict(train_counts) and manifest["data"]["eval"]["kept"] == 4
    assert manifest["fingerprints"]["the tokens of the held-out data"]

    weights = data / "packed" / "adapter" / "adapter_model.safetensors"
    before = weights.read_bytes()
    shutil.rmtree(weights.parent)
    shutil.rmtree(data / "packed" / "checkpoints" / "step-00000006")
    (data / "packed" / "status.json").write_text('{"state": "interrupted", "step": 3}')
    again, _, _ = run(data, "packed", packing=True, eval_size=0.1, resume=True)
    assert weights.read_bytes() == before
    assert [step["loss"] for step in again] == [step["loss"] for step in steps]


def test_padding_every_batch_to_the_same_length_changes_no_loss(data):
    short = {"steps": 2, "dropout": 0.0}
    plain, _, _ = run(data, "plain", **short)
    padded, _, _ = run(data, "padded", **short, pad_to_max_length=True)
    for one, other in zip(plain, padded, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["tokens"] == other["tokens"]


def test_every_batch_of_a_run_that_pads_to_max_length_has_one_shape(data, monkeypatch):
    shapes = set()
    model = LanguageModelLoss.__call__

    def record(self, input_ids, *more):
        shapes.add(input_ids.shape[1])
        return model(self, input_ids, *more)

    monkeypatch.setattr(LanguageModelLoss, "__call__", record)
    run(data, "padded", steps=2, eval_size=5, pad_to_max_length=True)
    assert shapes == {64}
    shapes.clear()
    run(data, "packed", steps=2, eval_size=5, pad_to_max_length=True, packing=True)
    assert shapes == {64}
