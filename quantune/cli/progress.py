"""A run as the terminal shows it: a progress bar for a person, plain lines otherwise."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.progress import MofNCompleteColumn, TextColumn, TimeRemainingColumn

from quantune.cli.bar import Bar
from quantune.cli.console import err, out, size, table
from quantune.recipe.schema import Recipe

if TYPE_CHECKING:
    from quantune.training.observer import EvaluationResult, ModelSummary, StepMetrics
    from quantune.training.run import RunResult

AVERAGED_STEPS = 20


class ConsoleObserver(Bar):
    """Shows a run's events on standard error."""

    def __init__(self, recipe: Recipe) -> None:
        self.every = recipe.logging.every_steps
        self.total = 0
        self.rounding = _rounding(recipe)
        self.recent: deque[StepMetrics] = deque(maxlen=AVERAGED_STEPS)
        numbers = TextColumn("{task.fields[numbers]}")
        super().__init__(MofNCompleteColumn(), numbers, TimeRemainingColumn(), numbers="")

    def phase(self, text: str) -> None:
        if err.is_terminal:
            self.bar.update(self.task, description=text)
        else:
            err.print(f"[dim]{escape(text)}[/]")

    def warning(self, text: str) -> None:
        err.print(f"[yellow]warning:[/] {escape(text)}")

    def data(self, name: str, counts: Any) -> None:
        lost = {
            "too long, dropped": counts.dropped_overlong,
            "too long, truncated": counts.truncated,
            "too long, split": counts.split,
            "without a target, dropped": counts.zero_target,
        }
        notes = "".join(f", [yellow]{count:,} {what}[/]" for what, count in lost.items() if count)
        held_out = f", {counts.held_out:,} held out" if counts.held_out else ""
        err.print(
            f"[bold]{name}[/]: {counts.kept:,} samples of {counts.rows:,} rows, {counts.tokens:,} tokens, "
            f"{counts.target_tokens:,} of them targets{held_out}{notes}"
        )
        if counts.packed_rows:
            err.print(f"packed into {counts.packed_rows:,} rows, {counts.fill:.1%} full")

    def model(self, summary: ModelSummary) -> None:
        rows = table("module", "stored as", ">count", ">weights", ">size")
        for row in summary.rows:
            rows.add_row(row.kind, row.dtype, f"{row.count}", f"{row.weights:,}", size(row.nbytes))
        total = sum(row.weights for row in summary.rows)
        rows.add_section()
        rows.add_row("all", "", "", f"{total:,}", size(sum(row.nbytes for row in summary.rows)))
        err.print(rows)
        shared = f", shared by {summary.processes} processes," if summary.processes > 1 else ""
        err.print(
            f"[bold]{escape(summary.base)}[/] on {escape(summary.device)} in {summary.precision}{shared} loaded in "
            f"{summary.seconds:.1f} s, peak {size(summary.peak_bytes)}; training {summary.trainable:,} weights "
            f"({summary.trainable / total:.1%}) on {summary.targets} layers"
        )
        if self.rounding is not None:
            err.print(f"what is trained computes as it will be packed ({self.rounding})")

    def start(self, step: int, total: int) -> None:
        self.total = total
        self.bar.update(self.task, description="training", completed=step, total=total)

    def step(self, metrics: StepMetrics) -> None:
        self.recent.append(metrics)
        numbers = self._numbers(metrics)
        self.bar.update(self.task, description="training", completed=metrics.step, numbers=numbers)
        if not err.is_terminal and (metrics.step % self.every == 0 or metrics.step == self.total):
            err.print(f"step {metrics.step}/{self.total}  {numbers}  epoch {metrics.epoch:.2f}")

    def evaluation(self, result: EvaluationResult) -> None:
        parts = [f"loss {result.loss:.4f}", f"perplexity {result.perplexity:.2f}"]
        if result.exact_match is not None:
            parts.append(f"[bold]exact match {result.exact_match:.1%}[/]")
        err.print(
            f"evaluation after step {result.step}: {', '.join(parts)} "
            f"[dim]({result.samples} samples, {result.seconds:.1f} s)[/]"
        )

    def checkpoint(self, step: int) -> None:
        if step != self.total:
            err.print(f"[dim]checkpoint after step {step}[/]")

    def _numbers(self, metrics: StepMetrics) -> str:
        tokens = sum(step.tokens for step in self.recent)
        seconds = sum(step.seconds for step in self.recent)
        if len(metrics.tokens_by_rank) == 1:
            return f"loss {metrics.loss:.4f}  lr {metrics.learning_rate:.2e}  {tokens / seconds:,.0f} tokens/s"
        waited = sum(step.data_share * step.seconds for step in self.recent) / seconds
        return (
            f"loss {metrics.loss:.4f} (max {metrics.loss_max:.4f})  lr {metrics.learning_rate:.2e}  "
            f"{tokens / seconds:,.0f} tokens/s  data {waited:.1%}  exchanged {size(metrics.communicated_bytes)}"
        )


def print_result(result: RunResult, *, packs: bool) -> None:
    """What a finished run came to, on standard output; `packs`: it was trained to be packed."""
    if result.evaluations:
        shown = table("evaluation", ">loss", ">perplexity", ">exact match")
        for evaluation in result.evaluations:
            match = "-" if evaluation.exact_match is None else f"{evaluation.exact_match:.1%}"
            name = f"after step {evaluation.step}" if evaluation.step else "before training"
            shown.add_row(name, f"{evaluation.loss:.4f}", f"{evaluation.perplexity:.2f}", match)
        out.print(shown)
        for prompt, reference, answer in result.evaluations[-1].examples:
            mark = "[green]=[/]" if answer == reference else f"[red]expected[/] {escape(reference)}"
            out.print(f"  {escape(' '.join(prompt.split()))} -> {escape(answer)} {mark}")
    here = f", {result.steps - result.steps_before} of them" if result.steps_before else ""
    out.print(f"{result.steps} steps{here} in {result.seconds:.0f} s")
    out.print(f"adapter: {escape(str(result.adapter))}")
    out.print(f"try it:  quantune generate {escape(str(result.folder))} --prompt '...'")
    onto = " --onto packed" if packs else ""
    out.print(f"merge:   quantune merge {escape(str(result.folder))}{onto}")


def _rounding(recipe: Recipe) -> str | None:
    """What a run with `[training.qat]` rounds to, and when."""
    qat, quantization = recipe.training.qat, recipe.quantization
    if qat is None or quantization is None:
        return None
    weight_dtype = getattr(quantization.options, "weight_dtype", quantization.backend)
    inputs = f", inputs to {qat.activation_dtype}" if qat.activation_dtype else ""
    begin = f", in training from step {qat.fake_quant_after_steps + 1} on" if qat.fake_quant_after_steps else ""
    return f"weights to {weight_dtype}{inputs}{begin}"
