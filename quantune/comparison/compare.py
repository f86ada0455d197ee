"""Loading one model in format after format, as a run loads it, and measuring each next to the unquantized model."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Protocol

import attrs
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantune.backends.checkpoints import in_words
from quantune.comparison import training_step
from quantune.comparison.formats import Format
from quantune.comparison.outputs import Predictions, output_figures, predict, targets
from quantune.comparison.rows import UNQUANTIZED, Comparison, FormatRow, Setting
from quantune.comparison.text import MAX_TOKENS, WINDOW, Text, Windows, cut
from quantune.comparison.training_step import make_batch, time_training
from quantune.comparison.weights import Sums, dense_sums, packed_parameters, packed_sums, time_dequantize
from quantune.errors import InputError, ModelError, QuantizationError, QuantuneError
from quantune.model.base import Base, skeleton
from quantune.model.device import DTYPES, Precision
from quantune.model.load import load_model, module_table
from quantune.model.targets import match_targets


class Observer(Protocol):
    """Is told how a comparison goes on."""

    def start(self, rows: int) -> None:
        """It begins, and will have so many rows."""

    def phase(self, format: str, text: str) -> None:
        """What is being done now, and with which format."""

    def row(self, row: FormatRow) -> None:
        """A row is complete."""


@attrs.frozen(kw_only=True, eq=False)
class Reference:
    """What is kept of the unquantized model while the formats are measured."""

    parameters: dict[str, Tensor]
    """Its weights by name, on the CPU."""
    predictions: Predictions


@attrs.frozen(kw_only=True, eq=False)
class Job:
    """What is the same for every format."""

    base: Base
    device: torch.device
    precision: Precision
    windows: Windows
    targets_N: Tensor
    batch: Tensor
    observer: Observer


def compare(
    base: Base,
    formats: Sequence[Format],
    *,
    text: Text,
    device: torch.device,
    precision: Precision,
    observer: Observer,
    max_tokens: int = MAX_TOKENS,
) -> Comparison:
    """Measure the unquantized model, then every format; one that fails becomes a row that says why.

    All figures but the times are the same in every run on the same machine with as many threads.

    Raises:
        InputError: the text is too short, or the model can't be loaded, has no linear layers, or is already quantized.
    """
    if base.stored is not None:
        raise InputError(
            f"{base.name} is already quantized ({in_words(base.stored)}), and formats are compared by what they make "
            "of the unquantized weights; choose the unquantized base"
        )
    meta = skeleton(base)
    match_targets(meta, training_step.ADAPTER)
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None) or WINDOW
    window = min(WINDOW, positions)
    windows = cut(text, base.tokenizer, max_tokens=max_tokens, window=window)
    tokens = [token for row in windows.rows for token in row]
    _require_known(tokens, meta, base)
    batch = make_batch(tokens, min(training_step.LENGTH, window), device)
    job = Job(
        base=base,
        device=device,
        precision=precision,
        windows=windows,
        targets_N=targets(windows, device),
        batch=batch,
        observer=observer,
    )
    observer.start(len(formats) + 1)
    reference, row = _measure_reference(job)
    rows = [row]
    observer.row(row)
    for format in formats:
        _free(device)
        row = _measure(job, format, reference)
        rows.append(row)
        observer.row(row)
    setting = Setting(
        model=base.name,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        precision=precision,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        text=text.name,
        text_tokens=windows.text_tokens,
        tokens=windows.predicted,
        window=window,
        batch=(batch.shape[0], batch.shape[1]),
    )
    return Comparison(setting=setting, rows=tuple(rows))


def _measure_reference(job: Job) -> tuple[Reference, FormatRow]:
    observe = job.observer.phase
    observe(UNQUANTIZED, "loading")
    begun = time.perf_counter()
    model = load_model(job.base, None, compute_dtype=DTYPES[job.precision], device=job.device)
    load_seconds = time.perf_counter() - begun
    nbytes = _model_bytes(model)
    observe(UNQUANTIZED, "perplexity")
    predictions = predict(model, job.windows)
    outputs = output_figures(predictions, predictions, job.targets_N)
    parameters = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    sums = dense_sums({name: parameters[name] for name in _layer_weights(model)})
    observe(UNQUANTIZED, "training steps")
    training = time_training(model, job.batch, base_name=job.base.source)
    row = FormatRow(
        format=UNQUANTIZED,
        load_seconds=load_seconds,
        model_bytes=nbytes,
        weights=_total(sums).figures("all"),
        kinds=tuple(one.figures(kind) for kind, one in sums.items()),
        outputs=outputs,
        training=training,
    )
    return Reference(parameters=parameters, predictions=predictions), row


def _measure(job: Job, format: Format, reference: Reference) -> FormatRow:
    """A format's row, with figures or with the reason why there are none."""
    problem = format.problem
    if problem is None:
        try:
            return _measure_format(job, format, reference)
        except QuantuneError as error:
            problem = str(error)
        except torch.OutOfMemoryError as error:
            problem = f"does not fit: {str(error).splitlines()[0]}"
        except Exception as error:  # a third party's code can raise anything; the other formats must be measured still
            if format.built_in:
                raise
            problem = f"{type(error).__name__}: {error}"
    return FormatRow(format=format.name, options=_options(format), problem=problem)


def _measure_format(job: Job, format: Format, reference: Reference) -> FormatRow:
    observe = job.observer.phase
    dtype = DTYPES[job.precision]
    observe(format.name, "loading")
    begun = time.perf_counter()
    model = load_model(job.base, format.quantization, compute_dtype=dtype, device=job.device)
    load_seconds = time.perf_counter() - begun
    observe(format.name, "error of the weights")
    packed = list(packed_parameters(model))
    if not packed:
        raise QuantizationError("expected packed weights in the model, found none")
    sums = packed_sums(packed, reference.parameters)
    observe(format.name, "dequantizing")
    dequantize = time_dequantize(packed, dtype)
    nbytes = _model_bytes(model)
    observe(format.name, "perplexity and KL")
    outputs = output_figures(predict(model, job.windows), reference.predictions, job.targets_N)
    observe(format.name, "training steps")
    training = time_training(model, job.batch, base_name=job.base.source)
    return FormatRow(
        format=format.name,
        options=_options(format),
        load_seconds=load_seconds,
        model_bytes=nbytes,
        weights=_total(sums).figures("all"),
        kinds=tuple(one.figures(kind) for kind, one in sums.items()),
        outputs=outputs,
        dequantize=dequantize,
        training=training,
    )


def _layer_weights(model: PreTrainedModel) -> list[str]:
    """The weights that formats are for: those of linear layers, the output head left out, and of fused experts."""
    head = model.get_output_embeddings()
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            names.append(f"{name}.weight")
        else:
            leaves = module.named_parameters(recurse=False)
            names += [f"{name}.{leaf}" for leaf, parameter in leaves if parameter.dim() == 3 and leaf.endswith("proj")]
    return names


def _total(sums: dict[str, Sums]) -> Sums:
    total = Sums()
    for one in sums.values():
        total += one
    return total


def _model_bytes(model: nn.Module) -> int:
    return sum(row.nbytes for row in module_table(model))


def _options(format: Format) -> dict[str, object]:
    return {} if format.quantization is None else attrs.asdict(format.quantization.options)


def _require_known(tokens: Sequence[int], meta: nn.Module, base: Base) -> None:
    """Refuse a tokenizer that knows more tokens than the model."""
    known = meta.get_input_embeddings().num_embeddings  # type: ignore[operator]  # a transformers model
    if max(tokens) >= known:
        raise ModelError(
            f"{base.name}: its tokenizer gives token {max(tokens)}, the model knows {known}; they don't belong together"
        )


def _free(device: torch.device) -> None:
    """Let go of the model before: what holds it refers to itself."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
