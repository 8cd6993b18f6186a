"""What a run tells: a line every so many steps, `metrics.csv`, and TensorBoard."""

from __future__ import annotations

import csv
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor

Row = dict[str, float]


class MetricsFile:
    """A CSV of one row per event, `step` first; columns appear when first used, and are empty where not.

    Args:
        path: of the file; replaced whole when its columns change, otherwise appended to.
        step: rows of later steps are dropped: the run will write them again.
    """

    def __init__(self, path: Path, step: int = 0):
        self.path = path
        self.columns = ["step"]
        if path.is_file():
            with open(path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or self.columns)
                kept = [row for row in reader if _whole(row) and int(row["step"]) <= step]
            self._rewrite(kept)

    def add(self, row: Row) -> None:
        """Append a row with a `step`; one of the same step and the same columns is replaced."""
        text = {name: f"{value:.10g}" for name, value in row.items()}
        new = [name for name in row if name not in self.columns]
        rows = self.rows() if new or not self.path.is_file() or "val/miou" in row else None
        self.columns += new
        if rows is None:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns, restval="").writerow(text)
            return
        same = [other for other in rows if not (other["step"] == text["step"] and _filled(other) == set(row))]
        self._rewrite([*same, text])

    def rows(self) -> list[dict[str, str]]:
        """All rows as text."""
        if not self.path.is_file():
            return []
        with open(self.path, newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if _whole(row)]

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        beside = self.path.with_name(self.path.name + ".tmp")
        with open(beside, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(beside, self.path)


def _whole(row: dict[str, Any]) -> bool:
    """A killed run may leave half a last line."""
    return (row.get("step") or "").isdigit() and None not in row and None not in row.values()


def _filled(row: dict[str, str]) -> set[str]:
    return {name for name, value in row.items() if value != ""}


class Reporter(Callback):
    """Means of the loss parts since the last report, learning rate, time per step and time spent waiting for data.

    The sums stay on the device between reports, so that no step waits for the numbers; they are part of the checkpoint.

    Args:
        path: of `metrics.csv`; other formats come from the trainer's loggers.
        every: optimiser steps between reports.
        step: the optimiser step the run continues from.
        lines: print a line per report (where there is no progress bar).
    """

    def __init__(self, path: Path, every: int, step: int = 0, lines: bool = True):
        self.path = path
        self.every = max(1, every)
        self.lines = lines
        self.latest: Row = {}
        self._from = step
        self._file: MetricsFile | None = None
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._count = 0
        self._seen = step
        self._mark = self._waiting = self._working = 0.0
        self._timed = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen = trainer.global_step
        self.resume_clock()

    def resume_clock(self) -> None:
        """Time from here on counts as waiting for the next batch."""
        self._mark = time.perf_counter()

    def on_train_batch_start(self, *_: Any) -> None:
        now = time.perf_counter()
        self._waiting += now - self._mark
        self._working += now - self._mark
        self._mark = now

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self._working += time.perf_counter() - self._mark
        self.resume_clock()
        if trainer.global_step == self._seen:
            return  # a micro-batch, not a step
        self._seen = trainer.global_step
        self._add(pl_module.parts)
        if self._seen % self.every == 0 or self._seen == trainer.max_steps:
            self._report(trainer, pl_module.rate)

    @torch.no_grad()
    def _add(self, parts: dict[str, Tensor]) -> None:
        self._names = list(parts)
        values = torch.stack([value.float() for value in parts.values()])
        self._sums = values if self._sums is None else self._sums.to(values.device) + values
        self._count += 1
        self._timed += 1

    def _report(self, trainer: Trainer, rate: float) -> None:
        assert self._sums is not None
        means = trainer.strategy.reduce(self._sums / self._count, reduce_op="mean")
        row: Row = {"step": float(self._seen), **dict(zip(self._names, means.tolist()))}
        row["lr"] = rate
        row["ms_per_step"] = round(1000 * self._working / max(1, self._timed), 2)
        row["data_ms"] = round(1000 * self._waiting / max(1, self._timed), 2)
        self._sums, self._count = None, 0
        self._waiting = self._working = 0.0
        self._timed = 0
        self.write(trainer, row)
        if self.lines and trainer.is_global_zero:
            print(self._line(row, int(trainer.max_steps)), flush=True)

    def write(self, trainer: Trainer, row: Row) -> None:
        """Put a row with a `step` into `metrics.csv` and the trainer's loggers; does nothing on other ranks."""
        self.latest = row
        if not trainer.is_global_zero:
            return
        if self._file is None:
            self._file = MetricsFile(self.path, self._from)
        self._file.add(row)
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))

    def _line(self, row: Row, steps: int) -> str:
        parts = "  ".join(f"{name} {row[name]:.4g}" for name in self._names)
        left = (steps - row["step"]) * row["ms_per_step"] / 1000
        return (
            f"step {int(row['step'])}/{steps}  {parts}  lr {row['lr']:.3g}  "
            f"{row['ms_per_step']:.0f} ms/step ({row['data_ms']:.0f} for data)  {duration(left)} left"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"names": self._names, "sums": self._sums, "count": self._count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._names, self._sums, self._count = state_dict["names"], state_dict["sums"], state_dict["count"]


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, with the latest report beside it."""

    def __init__(self, reporter: Reporter):
        super().__init__()
        self.reporter = reporter

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        shown = ("loss", "ms_per_step", "val/miou")
        return {name: f"{value:.4g}" for name, value in self.reporter.latest.items() if name in shown}


def on_terminal() -> bool:
    """Whether somebody is watching; a log file gets lines instead of a bar."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def duration(seconds: float) -> str:
    """ "1:02:03" or "2:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
