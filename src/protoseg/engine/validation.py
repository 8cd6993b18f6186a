"""Validation between two training steps, and the best model so far.

This is a callback and not Lightning's validation loop because of exact resume: Lightning skips a validation that a kill
cut short, so that the metrics, and which model is best, would depend on when a run was killed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from protoseg.engine.averaging import WeightAverage
from protoseg.engine.checkpoints import Checkpoints, is_due
from protoseg.engine.module import Batch, SegmentationModule
from protoseg.engine.reporting import Reporter


class Validation(Checkpoint):
    """Validates every so many steps and at the end; hands the best model by mIoU to `save_best`.

    It must stand behind `Checkpoints` among the callbacks: a checkpoint precedes each validation and says that it is
    due, so a run killed while it validates does so first of all when it is resumed.

    Args:
        batches: the validation split, as `SegmentationModule.validate` takes it.
        every: optimiser steps; 0: only at the end.
        save_best: called on rank 0 with the module and the metrics, while the averaged weights are in place.
        reporter, checkpoints: the other callbacks of the run.
        average: the moving average to validate instead of the last weights.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        every: int,
        save_best: Callable[[SegmentationModule, dict[str, float]], None],
        *,
        reporter: Reporter,
        checkpoints: Checkpoints,
        average: WeightAverage | None = None,
    ):
        self.batches = batches
        self.every = every
        self.save_best = save_best
        self.reporter = reporter
        self.checkpoints = checkpoints
        self.average = average
        self.best = -math.inf
        self.best_step = 0
        self._step = 0
        self._done = 0  # the step of the last validation
        self._due = 0  # the step a checkpoint promised one for

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self._due > self._done:
            self._validate(trainer, pl_module, self._due)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self._step:
            return  # a micro-batch, not a step
        self._step = trainer.global_step
        if self.is_due(self._step, trainer):
            self._validate(trainer, pl_module, self._step)

    def is_due(self, step: int, trainer: Trainer) -> bool:
        return is_due(step, self.every) or step == trainer.max_steps

    def _validate(self, trainer: Trainer, module: SegmentationModule, step: int) -> None:
        averaged = self.average.applied(module) if self.average else contextlib.nullcontext()
        with averaged, trainer.precision_plugin.val_step_context():
            metrics = module.validate(self._interruptible(trainer))
            better = metrics["val/miou"] > self.best
            if better:
                self.best, self.best_step = metrics["val/miou"], step
                if trainer.is_global_zero:
                    self.save_best(module, {"step": float(step), **metrics})
        self._done = step
        self.reporter.write(trainer, {"step": float(step), **metrics})
        trainer.print(
            f"step {step}  val/miou {metrics['val/miou']:.4f}  pixel accuracy {metrics['val/pixel_accuracy']:.4f}  "
            f"over {metrics['val/classes']:.0f} classes" + ("  (best so far)" if better else ""),
            flush=True,
        )
        self.reporter.resume_clock()

    def _interruptible(self, trainer: Trainer) -> Iterator[Batch]:
        """The batches, unless the run is asked to stop: the checkpoint of this step is written, so nothing is lost."""
        for batch in self.batches:
            # ranks may hold different numbers of images, so they cannot ask each other here
            if trainer.world_size == 1 and self.checkpoints.must_stop(trainer):
                raise self.checkpoints.interrupted(trainer)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "done": self._done, "due": self._due}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        step = trainer.global_step
        due = step if step > 0 and self.is_due(step, trainer) else self._due
        checkpoint["callbacks"][self.state_key] = {**self.state_dict(), "due": due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
        self._done, self._due = state_dict["done"], state_dict["due"]
        self._step = max(self._done, self._due)
