"""What a run writes down while it trains: steps, evaluations, checkpoints, and how it ended."""

from __future__ import annotations

from typing import Literal

import attrs
from transformers import PreTrainedTokenizerBase

from quantune.checkpoint.history import digest
from quantune.checkpoint.identity import Identity
from quantune.checkpoint.run_folder import RunFolder
from quantune.checkpoint.saver import Saver
from quantune.checkpoint.state import TrainingState, capture
from quantune.data.dataset import Dataset
from quantune.distributed.watch import LOADING_PATIENCE
from quantune.model.compilation import suspended
from quantune.training.evaluate import Stopped, evaluate
from quantune.training.loop import Hooks, Job, Progress, StepResult
from quantune.training.observer import EvaluationResult
from quantune.training.process import Process


@attrs.define(kw_only=True, eq=False)
class Recorder:
    """Evaluates, saves and keeps the run's books. All ranks have one; rank 0's writes."""

    job: Job
    folder: RunFolder
    process: Process
    tokenizer: PreTrainedTokenizerBase
    held_out: Dataset | None
    """What is evaluated on."""
    identity: Identity
    """What makes the run the run it is."""
    evaluations: list[EvaluationResult] = attrs.field(factory=list)
    """Of this attempt."""
    saver: Saver = attrs.field(init=False)
    """Must be entered while the run trains."""

    def __attrs_post_init__(self) -> None:
        self.saver = Saver(
            store=self.folder.checkpoints,
            keep=self.job.recipe.checkpoint.keep,
            prepare=self._flush,
            committed=self._committed,
            lost=self.process.observer.warning,
            world=self.job.world,
        )

    def hooks(self) -> Hooks:
        """What the loop calls between steps."""
        return Hooks(
            record=self.record,
            evaluate=self.evaluate,
            save=self.save,
            failed=self.saver.failed,
            settle=self.saver.finish,
        )

    def record(self, done: StepResult) -> None:
        """Write down a step."""
        self._trains(done.metrics.step)
        if self.job.world.main:
            tokens = ((sample.input_ids, sample.is_target) for sample in done.samples)
            samples = list(done.indices)
            self.folder.history.append("step", step=done.metrics.step, samples=samples, digest=digest(tokens))
            self.folder.metrics.append({"event": "step", **attrs.asdict(done.metrics)})

    def evaluate(self, step: int) -> bool:
        """Evaluate, if there is something to evaluate on; True when a rank was asked to stop meanwhile."""
        if self.held_out is None:
            return False
        job = self.job
        self.process.beat(f"evaluating after step {step}", 1.0)
        try:
            with suspended(job.recipe.training.compile):
                result = evaluate(
                    job.root,
                    job.loss,
                    self.held_out.samples,
                    self.tokenizer,
                    job.recipe.evaluation,
                    pad_id=job.pad_id,
                    device=job.device,
                    step=step,
                    pad_to=job.pad_to,
                    world=job.world,
                    asked=lambda: self.process.stop.asked,
                )
        except Stopped:
            return True
        if job.world.main:
            self.folder.metrics.append({"event": "evaluation", **attrs.asdict(result)})
            self.folder.history.append("evaluation", step=step)
        self.evaluations.append(result)
        self.process.observer.evaluation(result)
        self._trains(step)
        return False

    def save(self, progress: Progress) -> None:
        """Begin to write a checkpoint."""

        def take() -> TrainingState | None:
            state = capture(
                parameters=self.job.parameters,
                optimizer=self.job.optimizer,
                progress=attrs.asdict(progress),
                identity=self.identity.to_json(),
                world=self.job.world,
            )
            if self.job.world.main:
                self.folder.history.append("saving", step=progress.step)
            return state

        # the save before it may still be under way
        self.process.beat(f"saving after step {progress.step}", LOADING_PATIENCE)
        self.saver.save(progress.step, take)
        self._trains(progress.step)

    def ended(self, how: Literal["interrupted", "finished"], step: int) -> None:
        """Write down how the attempt ended. The history first: what it lacks nothing makes up for."""
        if self.job.world.main:
            self.folder.history.append(how, step=step)
            self.folder.write_status(how, step)

    def _trains(self, step: int) -> None:
        self.process.beat(f"training, after step {step}", 1.0)

    def _committed(self, step: int) -> None:
        self.folder.history.append("checkpoint", step=step)
        self.folder.write_status("running", step)
        self.process.observer.checkpoint(step)

    def _flush(self) -> None:
        self.folder.history.flush()
        self.folder.metrics.flush()
