"""Bases with tokenizers, and adapters on them that look trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import attrs
import pytest
import torch
from model.conftest import (  # noqa: F401  # fixtures
    deepseek_fp8,
    gpt2,
    gpt_oss_mxfp4,
    llama,
    mixtures,
    tied_llama,
)

from quantune.merge.merge import merge
from quantune.merge.request import MergeRequest, Setting
from quantune.merge.trained import TrainedAdapter
from quantune.model import adapter, mini
from quantune.model.base import open_base, skeleton
from quantune.model.device import DTYPES
from quantune.model.load import load_model
from quantune.recipe.schema import AdapterConfig, ModelConfig

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 27).view(2, 12)


class Quiet:
    """An observer of a merge that keeps the warnings."""

    def __init__(self):
        self.notes, self.warnings = [], []

    def phase(self, text): ...

    def begin(self, nbytes): ...

    def wrote(self, nbytes): ...

    def note(self, text):
        self.notes.append(text)

    def warning(self, text):
        self.warnings.append(text)


@attrs.frozen
class Trained:
    """An adapter in a folder, and what base and adapter answer together."""

    folder: Path
    setting: Setting
    logits: torch.Tensor

    def request(self, out, **options) -> MergeRequest:
        """What merging it takes."""
        found = TrainedAdapter(folder=self.folder, recipe=None, fingerprints={}, run=None)
        given = {"dtype": torch.float32, "verify": False, **options}
        return MergeRequest(adapters=(found,), weights=(1.0,), setting=self.setting, out=out, **given)

    def merge(self, out, **options):
        """Merge it; returns the folder."""
        merge(self.request(out, **options), CPU, Quiet())
        return out


def with_tokenizer(base, folder):
    """A copy of a base with a tokenizer."""
    shutil.copytree(base, folder)
    for path in mini.PATH.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@torch.no_grad()
def train(base, folder, quantization=None, *, model=None, precision="fp32", **options) -> Trained:
    """An adapter on `base` whose every parameter is drawn at random, as `[adapter]` says with `options`."""
    config = AdapterConfig(**{"r": 4, "alpha": 8.0, **options})
    setting = Setting(
        model=model or ModelConfig(base=str(base)),
        quantization=quantization,
        adapter=config,
        seed=0,
        precision=precision,
    )
    opened = open_base(setting.model, quantization)
    setting = attrs.evolve(setting, quantization=opened.quantization)
    split = adapter.build_initialization(skeleton(opened), config, seed=0)
    loaded = load_model(opened, opened.quantization, compute_dtype=DTYPES[precision], device=CPU, initialization=split)
    adapted = adapter.attach(loaded, config, base_name=str(base), seed=0, initialization=split)
    torch.manual_seed(1)
    for parameter in adapter.trainable_parameters(adapted).values():
        parameter.add_(0.05 * torch.randn_like(parameter))
    adapted.eval()
    logits = adapted(TOKENS).logits
    adapter.save_adapter(adapted, folder)
    return Trained(folder, setting, logits)


@pytest.fixture(scope="session")
def bases(llama, tied_llama, mixtures, gpt_oss_mxfp4, deepseek_fp8, tmp_path_factory):  # noqa: F811  # fixtures
    """Tiny bases with tokenizers, by name."""
    folder = tmp_path_factory.mktemp("bases")
    sources = {
        "llama": llama,
        "tied": tied_llama,
        **mixtures,
        "gpt_oss_mxfp4": gpt_oss_mxfp4,
        "deepseek_fp8": deepseek_fp8,
    }
    return {name: with_tokenizer(source, folder / name) for name, source in sources.items()}
