"""`checkpoints/last.ckpt`: written between two steps, never half, and always before a run is asked to end.

A checkpoint serves one purpose, to continue its own run. What others load is the model folder of `models.saving`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from protoseg.config import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class AtomicFiles(TorchCheckpointIO):
    """Checkpoint files that are whole or absent: written beside, flushed, then renamed. Read as plain data only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        target = Path(path)
        beside = target.with_name(target.name + ".tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, target)
        except (OSError, RuntimeError) as fault:  # torch reports a full disk as a RuntimeError of its zip writer
            beside.unlink(missing_ok=True)
            raise UserError(f"{target}: cannot write the checkpoint ({fault}); free or choose another disk") from fault

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint of ours, on the CPU; plain data and tensors, no code.

    Raises:
        UserError: no such file, or not a whole checkpoint.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; --resume auto takes checkpoints/last.ckpt of the run folder")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as fault:  # torch raises a dozen unrelated types for files that are broken or not its own
        # torch's messages run on with advice about pickles and other people's mistakes
        reason = str(fault).strip().splitlines()[0].split(". ")[0] if str(fault).strip() else type(fault).__name__
        raise UserError(
            f"{path}: not a readable checkpoint ({reason}); resume from another one, or start a new run with --out"
        ) from fault
    if not isinstance(content, dict) or not {"state_dict", "loops", "global_step"} <= set(content):
        raise UserError(f"{path}: not a checkpoint of a training run; a model folder is for evaluate and predict")
    return content


class Interrupted(SystemExit):
    """The run was asked to end by a signal; its code is the one shells expect, 128 + signal."""


class StopRequest:
    """Remembers that SIGTERM or SIGINT came, so that the run can end between two steps.

    A second SIGINT interrupts at once (the last checkpoint stays); further SIGTERMs change nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                previous = signal.signal(number, self._note)
                if previous != self._note:
                    self._previous.setdefault(number, previous)

    def restore(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._previous.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def interruption(self) -> Interrupted:
        assert self.signal is not None
        return Interrupted(128 + self.signal)


def forget_signals(_: int) -> None:
    """For loader processes, as their `worker_init_fn`: they are forked with the handlers of the training process.

    A SIGTERM ends them, as torch expects when it stops them. A Ctrl-C, which a terminal sends to all processes of a
    command, does not: the training process still wants the batch of the step it is in.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Checkpoints(Checkpoint):
    """Writes `path` every so many optimiser steps or minutes, before validations, at the end and when asked to stop.

    Only the state between two steps is ever written: that is what makes a resumed run equal to an uninterrupted one.
    An exception between two steps (a loader that dies) also leaves a checkpoint; one inside a step (out of memory)
    leaves the last regular one.

    Args:
        path: of the checkpoint file.
        every: optimiser steps; 0: only where the others ask.
        minutes: since the last write, by the clock; 0: no matter how many.
        validate_every: optimiser steps between validations; a checkpoint precedes each, so that none is lost.
        stop: what the signal handlers fill in.
        settings: plain data a resumed run must agree with; kept in the checkpoint.
    """

    def __init__(
        self,
        path: Path,
        every: int,
        validate_every: int,
        stop: StopRequest,
        settings: dict[str, Any],
        minutes: float = 0.0,
    ):
        self.path = path
        self.every = every
        self.minutes = minutes
        self.validate_every = validate_every
        self.stop = stop
        self.settings = settings
        self._seen = self._saved = -1
        self._between_steps = True
        self._clock = time.monotonic()  # of the last write

    def state_dict(self) -> dict[str, Any]:
        return {"settings": self.settings}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop.install()  # Lightning has put its own handler for SIGTERM in the place of ours
        self._seen = self._saved = trainer.global_step
        self._clock = time.monotonic()

    def on_train_batch_start(self, *_: Any) -> None:
        self._between_steps = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self._seen:
            return  # a micro-batch: gradients are half summed, nothing to continue from
        self._seen = step = trainer.global_step
        self._between_steps = True
        stop, late = self.must_stop(trainer), self.is_late(trainer)
        if stop or late or step >= trainer.max_steps or is_due(step, self.every) or is_due(step, self.validate_every):
            self.save(trainer)
        if stop:
            raise self.interrupted(trainer)

    def must_stop(self, trainer: Trainer) -> bool:
        """Whether any rank was asked to stop; all ranks call this together."""
        asked = self.stop.signal is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
            if asked and self.stop.signal is None:
                self.stop.signal = signal.SIGTERM
        return asked

    def is_late(self, trainer: Trainer) -> bool:
        """Whether the last write is `minutes` ago on any rank; clocks differ, so all ranks call this together."""
        late = 0 < 60 * self.minutes <= time.monotonic() - self._clock
        if self.minutes and trainer.world_size > 1:
            late = trainer.strategy.reduce_boolean_decision(late, all=False)
        return late

    def interrupted(self, trainer: Trainer) -> Interrupted:
        if trainer.is_global_zero:
            name = signal.Signals(self.stop.signal or signal.SIGTERM).name
            print(f"stopped by {name}; --resume auto continues from step {self._saved}", file=sys.stderr, flush=True)
        return self.stop.interruption()

    def save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)  # optimiser and loader as well
        self._saved = trainer.global_step
        self._clock = time.monotonic()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # with several ranks a checkpoint needs all of them, and at least one is gone
        alone = trainer.world_size == 1
        if alone and self._between_steps and self._saved >= 0 and trainer.global_step > self._saved:
            self.save(trainer)


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step > 0 and step % every == 0
