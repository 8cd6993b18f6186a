"""`protoseg study`: variants of a recipe x seeds -> run folders, and one comparison of them all.

    runs/NAME/
      study.yaml             the study, whole; `protoseg study NAME` reads it again
      recipe.yaml            the recipe that is varied, whole
      VARIANT/seed0/         a cell: an ordinary run folder (`tasks.training`), evaluated on its `final/`
        cell.json            its settings, how far it is, what it took
        cell.log             what it printed
      results.json, results.csv, report.md, report.html, differences.png

Cells of one seed are paired: same order of the data, same augmentation, same start of backbone, decoder and projection
whatever the head is. Every cell is a process of its own, claimed by a lock that dies with it, so that several studies
may work on one folder and any of them may be killed.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from protoseg.config import Study, UserError
from protoseg.tasks import study_report
from protoseg.tasks.evaluation import percent
from protoseg.tasks.study_cell import note, read_state
from protoseg.tasks.study_plan import (
    Build,
    Cell,
    cells_of,
    check_kept,
    fingerprint,
    is_done,
    keep,
    settings_of,
    variants_of,
)

LOG = "cell.log"
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def study(
    folder: Path,
    plan: Study,
    build: Build,
    *,
    workers: int = 1,
    threads: int = 0,
    devices: Sequence[str] = (),
    only: Sequence[str] = (),
    dry_run: bool = False,
    report_only: bool = False,
) -> int:
    """Run what is missing of a study, and write its report.

    Args:
        folder: of the study.
        plan: the study.
        build: dotted settings -> the recipe with them; raises `UserError` for a setting that does not exist.
        workers: cells that run at the same time.
        threads: CPU threads of a cell; 0: OMP_NUM_THREADS, or else the CPUs at hand divided by `workers`.
        devices: GPUs by number; cells take them in turn.
        only: variants to run; the report shows all.
        dry_run: print the cells and how far they are, nothing else.
        report_only: run nothing.

    Returns:
        The exit code: 0; 1 if a cell failed; 128 + its number if a signal stopped it (130: Ctrl-C).

    Raises:
        UserError: a study that does not fit together, or a cell that exists with other settings.
    """
    if workers < 1 or threads < 0:
        raise UserError(f"workers must be at least 1 and threads at least 0, given {workers} and {threads}")
    variants = variants_of(plan)
    cells = cells_of(folder, plan, variants, build)
    for name in only:
        if name not in variants:
            raise UserError(f"--only {name}: the study has no such variant; it has {', '.join(variants)}")
    for cell in cells:
        check_kept(cell)
    chosen = [cell for cell in cells if not only or cell.variant in only]
    if dry_run:
        print_cells(folder, chosen, plan)
        return 0
    study_report.check_libraries()
    keep(folder, plan, build)
    code = 0
    if not report_only:
        code = run_cells(folder, chosen, plan, workers, threads or default_threads(workers), devices)
    written = study_report.write(folder, plan, variants, [(cell.variant, cell.seed, cell.folder) for cell in cells])
    print(f"\n{written['text']}\nreport: {written['page']}")
    return code


def claim_file(folder: Path, cell: Cell) -> Path:
    return folder / ".claims" / cell.name.replace("/", "-")


def claim(folder: Path, cell: Cell) -> IO[str] | None:
    """The open lock of a cell, None where another process has it. It is held until every copy of it is closed.

    Raises:
        UserError: the folder cannot be written.
    """
    path = claim_file(folder, cell)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "a")  # noqa: SIM115 - held; never removed: whoever locks an unlinked file locks nothing
    except OSError as fault:
        raise UserError(f"{path}: cannot be written ({fault}); choose another folder with --runs") from fault
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def how_far(folder: Path, cell: Cell, plan: Study) -> str:
    """One word for a person: done, running, failed, stopped, waiting."""
    if is_done(cell, plan):
        return "done"
    if claim_file(folder, cell).is_file():
        if (lock := claim(folder, cell)) is None:
            return "running"
        lock.close()
    state = read_state(cell.folder).get("state", "waiting")
    return state if state in ("failed", "waiting") else "stopped"


def print_cells(folder: Path, cells: list[Cell], plan: Study) -> None:
    """The cells, how far they are, and the hash of their settings."""
    width = max(len(cell.name) for cell in cells)
    for cell in cells:
        print(f"{cell.name:<{width}}  {how_far(folder, cell, plan):<8} {fingerprint(settings_of(cell.recipe))}")
    done = sum(is_done(cell, plan) for cell in cells)
    print(f"{done} of {len(cells)} cells done; columns: {', '.join(plan.evaluate)}")


def default_threads(workers: int) -> int:
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else max(1, len(os.sched_getaffinity(0)) // workers)


@dataclass
class Running:
    """A cell and its process."""

    cell: Cell
    process: subprocess.Popen[bytes]
    lock: IO[str]
    device: str | None
    began: float


def run_cells(folder: Path, cells: list[Cell], plan: Study, workers: int, threads: int, devices: Sequence[str]) -> int:
    """Run the cells that are not done, `workers` at a time; a failed one does not stop the others.

    A signal is handed on to the running cells, which write their checkpoints and end; a second one kills them.

    Returns:
        0, 1 if a cell failed, 128 + signal if one came.
    """
    waiting = [cell for cell in cells if not is_done(cell, plan)]
    print(f"{len(cells) - len(waiting)} of {len(cells)} cells are done", flush=True)
    running: list[Running] = []
    failed = elsewhere = 0
    with Signals() as signals:
        try:
            while waiting or running:
                for one in [one for one in running if one.process.poll() is not None]:
                    failed += not finish(one, plan, stopped=bool(signals.came))
                    one.lock.close()
                    running.remove(one)
                if signals.came:
                    waiting.clear()
                    signals.hand_on(one.process for one in running)
                while waiting and len(running) < workers:
                    cell = waiting.pop(0)
                    started = start(folder, cell, plan, workers, threads, least_busy(devices, running))
                    if started is None:
                        elsewhere += not is_done(cell, plan)
                    else:
                        running.append(started)
                time.sleep(0.1)
        finally:  # a fault of the study's own leaves no cell behind
            for one in running:
                one.process.terminate()
                one.process.wait()
                one.lock.close()
    if elsewhere:
        print(f"being run by another process: {elsewhere}")
    if failed:
        print(f"failed: {failed}; run the study again to try again", file=sys.stderr)
    if signals.came:
        print("stopped; run the study again to go on", file=sys.stderr)
        return 128 + signals.came[0]
    return 1 if failed else 0


def least_busy(devices: Sequence[str], running: list[Running]) -> str | None:
    """The GPU with the fewest cells, the first such; None where none was named."""
    return min(devices, key=lambda device: sum(one.device == device for one in running), default=None)


def start(folder: Path, cell: Cell, plan: Study, workers: int, threads: int, device: str | None) -> Running | None:
    """Claim a cell and start its process; None where another process has it, or has just done it."""
    if (lock := claim(folder, cell)) is None:
        return None
    if is_done(cell, plan):
        lock.close()
        return None
    settings = settings_of(cell.recipe)
    cell.folder.mkdir(parents=True, exist_ok=True)
    note(
        cell.folder,
        variant=cell.variant,
        seed=cell.seed,
        hash=fingerprint(settings),
        settings=settings,
        recipe=json.loads(json.dumps(dataclasses.asdict(cell.recipe))),
        columns=plan.evaluate,
        workers=workers,
        state="starting",
        error=None,
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    with open(cell.folder / LOG, "ab") as log:
        process = subprocess.Popen(
            command(cell),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a Ctrl-C is for us; we hand it on
            pass_fds=(lock.fileno(),),  # should we be killed, the claim lives as long as the cell
        )
    print(f"{cell.name}: started" + (f" on GPU {device}" if device is not None else ""), flush=True)
    return Running(cell, process, lock, device, time.monotonic())


def command(cell: Cell) -> list[str]:
    """What runs a cell, once its `cell.json` is there."""
    return [sys.executable, "-m", "protoseg.tasks.study_cell", str(cell.folder)]


def finish(one: Running, plan: Study, stopped: bool) -> bool:
    """Say how a cell ended and keep it where it did not end well; False if it failed."""
    code, cell = one.process.returncode, one.cell
    took = f"{time.monotonic() - one.began:.0f} s"
    error = None
    if code == 0:
        print(f"{cell.name}: done in {took}{scores(one, plan)}", flush=True)
    elif stopped:
        note(cell.folder, state="stopped")
        print(f"{cell.name}: stopped after {took}", flush=True)
    else:
        lines = (cell.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        error = f"killed by {signal.Signals(-code).name}" if code < 0 else last or f"exit code {code}"
        note(cell.folder, state="failed", error=error[:500])
        print(f"{cell.name}: FAILED after {took}: {error} (see {cell.folder / LOG})", file=sys.stderr, flush=True)
    return error is None


def scores(one: Running, plan: Study) -> str:
    """The first metric of every column, for the line of a finished cell."""
    result = study_report.read(one.cell.variant, one.cell.seed, one.cell.folder, plan)
    if result is None:
        return ""
    metric = plan.metrics[0]
    found = [f"{percent(numbers.get(metric))} {column}" for column, numbers in result.columns.items()]
    return f", {study_report.METRICS[metric]} {', '.join(found)}"


class Signals:
    """While this is entered, signals that ask to stop are noted, to be handed on."""

    def __init__(self) -> None:
        self.came: list[int] = []
        self._handed = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in STOPPING:
            if signal.getsignal(number) == signal.SIG_IGN:  # nohup
                continue
            self._previous[number] = signal.signal(number, lambda came, _: self.came.append(came))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def hand_on(self, processes: Iterable[subprocess.Popen[bytes]]) -> None:
        """The first signal asks the cells to write their checkpoints and end, a second one ends them at once."""
        if len(self.came) == self._handed:
            return
        for process in processes:
            process.send_signal(signal.SIGTERM if self._handed == 0 else signal.SIGKILL)
        self._handed = len(self.came)
