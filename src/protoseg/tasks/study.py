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
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from protoseg.config import Recipe, Study, UserError
from protoseg.tasks import study_report, training
from protoseg.tasks.files import write_whole
from protoseg.tasks.study_cell import evaluation_file, note, read_state

SETTABLE = ("out", "seed", "resume")  # the study's own business
# Change no number, or only where it is computed: a cell may be continued on another machine. `model.weights` is where
# the weights lie; whether there are any is compared.
NEUTRAL = (
    *("out", "resume", "accelerator", "devices", "nodes", "val_every", "checkpoint_every", "log_every"),
    *("data.root", "data.file", "data.workers", "data.cache", "data.max_pixels", "model.weights", "model.pretrained"),
)
LOG = "cell.log"


@dataclass(frozen=True)
class Cell:
    """One run of the study.

    Args:
        variant, seed: which.
        recipe: the whole run; its `out` is the cell's folder.
    """

    variant: str
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        return f"{self.variant}/seed{self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.recipe.out)


def study(
    folder: Path,
    plan: Study,
    build: Callable[[dict[str, Any]], Recipe],
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
        The exit code: 0; 1 if a cell failed; 130 or 143 if SIGINT or SIGTERM stopped it.

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


def variants_of(plan: Study) -> dict[str, dict[str, Any]]:
    """Name -> dotted settings of every variant, those of the grid named by their values.

    Raises:
        UserError: no variant, two of one name, a name that is no folder name, a baseline that is no variant.
    """
    found = dict(plan.variants)
    for setting, values in plan.grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"grid: {setting} needs a list of values, given {values!r}")
    short = {setting: setting.rpartition(".")[2] for setting in plan.grid}
    if len(set(short.values())) < len(short):
        short = {setting: setting for setting in plan.grid}
    if plan.grid:
        for combination in itertools.product(*plan.grid.values()):
            chosen = dict(zip(plan.grid, combination))
            name = ",".join(f"{short[setting]}={_word(value)}" for setting, value in chosen.items())
            if name in found:
                raise UserError(f"grid: the combination {name} is already a variant; rename or remove one")
            found[name] = chosen
    if not found:
        raise UserError("the study has no variants; give `variants` or a `grid`")
    for name in found:
        if not re.fullmatch(r"[\w+=,-][\w.+=,-]*", name):
            raise UserError(f"variant {name!r} becomes a folder: use letters, digits and . _ + = , - only")
    for name in plan.baselines:
        if name not in found:
            raise UserError(f"baseline {name!r} is no variant; there are {', '.join(found)}")
    return found


def _word(value: Any) -> str:
    return re.sub(r"[^\w.+-]+", "_", str(value)).strip("_")


def cells_of(
    folder: Path, plan: Study, variants: dict[str, dict[str, Any]], build: Callable[[dict[str, Any]], Recipe]
) -> list[Cell]:
    """Every cell, all variants of a seed before the next seed: pairs are complete early.

    Raises:
        UserError: settings that do not exist or do not fit together; names the variant.
    """
    if not plan.seeds or len(set(plan.seeds)) < len(plan.seeds) or min(plan.seeds) < 0:
        raise UserError(f"seeds must be different numbers from 0 on, given {list(plan.seeds)}")
    for column, what in plan.evaluate.items():
        if not re.fullmatch(r"\w[\w.-]*", column) or not re.fullmatch(r"[\w.-]+(/[^*/]+\*)?", what):
            raise UserError(f"evaluate: {column}: {what} is not `COLUMN: SPLIT` or `COLUMN: SPLIT/BEGINNING*`")
    recipes = {}
    for name, settings in variants.items():
        for setting in (*settings, *plan.overrides):
            if setting in SETTABLE:
                raise UserError(f"variant {name}: {setting} is set by the study itself; remove it")
        try:
            recipe = build({**plan.overrides, **settings})
            training.check(recipe)
        except UserError as fault:
            raise type(fault)(f"variant {name}: {fault}") from fault
        if recipe.devices != 1 or recipe.nodes != 1:
            raise UserError(f"variant {name}: a cell runs in one process on one device; set devices and nodes to 1")
        recipes[name] = recipe
    return [
        Cell(name, seed, dataclasses.replace(recipe, seed=seed, out=str(folder / name / f"seed{seed}"), resume=""))
        for seed in plan.seeds
        for name, recipe in recipes.items()
    ]


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What a cell's numbers depend on, flat; None of it is a path."""
    kept = {name: value for name, value in training.flat(dataclasses.asdict(recipe)).items() if name not in NEUTRAL}
    weights = recipe.model.pretrained or bool(recipe.model.weights)
    return {**json.loads(json.dumps(kept)), "pretrained weights": weights}


def fingerprint(settings: dict[str, Any]) -> str:
    """A short hash of the settings that differ from the defaults: new settings of later versions leave it alone."""
    usual = settings_of(Recipe())
    given = {name: value for name, value in sorted(settings.items()) if usual.get(name) != value}
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()[:12]


def check_kept(cell: Cell) -> None:
    """Refuse to mix two experiments in one folder.

    Raises:
        UserError: the cell began with other settings; names them. Or its folder holds a run that is no cell.
    """
    kept = read_state(cell.folder).get("settings")
    if kept is None:
        if (cell.folder / "config.yaml").is_file():
            raise UserError(f"{cell.folder} holds a run that is no part of a study; choose another NAME or remove it")
        return
    usual = settings_of(Recipe())  # of settings that did not exist when the cell began
    changed = [
        f"{name} was {kept.get(name, usual.get(name))!r}, now {value!r}"
        for name, value in settings_of(cell.recipe).items()
        if kept.get(name, usual.get(name)) != value
    ]
    if changed:
        raise UserError(
            f"{cell.folder} was run with other settings: {'; '.join(changed)}. "
            "Put them back, choose another NAME or another variant's name, or remove that folder"
        )


def keep(folder: Path, plan: Study, build: Callable[[dict[str, Any]], Recipe]) -> None:
    """Write `recipe.yaml` and a `study.yaml` that refers to it: the folder is enough to go on from."""
    # without the overrides: study.yaml holds those
    recipe = json.loads(json.dumps(dataclasses.asdict(build({}))))
    content = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(plan, recipe="recipe.yaml"))))
    _write_yaml(folder / "recipe.yaml", f"# the recipe of the study {folder.name}\n", recipe)
    _write_yaml(folder / "study.yaml", f"# protoseg study {folder.name}\n", content)


def _write_yaml(path: Path, header: str, content: Any) -> None:
    text = header + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_whole(path, lambda fresh: fresh.write_text(text, encoding="utf-8"))


def is_done(cell: Cell, plan: Study) -> bool:
    """Trained, and evaluated as the study asks today."""
    state = read_state(cell.folder)
    evaluated = state.get("evaluated", {})
    return bool(state.get("trained")) and all(
        evaluated.get(column) == what and evaluation_file(cell.folder, column).is_file()
        for column, what in plan.evaluate.items()
    )


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
    print(f"{len(cells) - len(waiting)} of {len(cells)} cells are done")
    running: list[Running] = []
    failed = elsewhere = 0
    signals = Signals()
    with signals:
        while waiting or running:
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                failed += not finish(one, stopped=bool(signals.came))
                one.lock.close()
            if signals.came:
                waiting.clear()
                signals.hand_on(one.process for one in running)
            while waiting and len(running) < workers:
                cell = waiting.pop(0)
                device = least_busy(devices, running)
                started = start(folder, cell, plan, threads, device)
                if started is None:
                    elsewhere += not is_done(cell, plan)
                else:
                    running.append(started)
            time.sleep(0.1)
    if elsewhere:
        print(f"{elsewhere} cells are being run by another process")
    if failed:
        print(f"{failed} cells failed; run the study again to try them again", file=sys.stderr)
    if signals.came:
        print("stopped; run the study again to go on", file=sys.stderr)
        return 128 + signals.came[0]
    return 1 if failed else 0


def least_busy(devices: Sequence[str], running: list[Running]) -> str | None:
    """The GPU with the fewest cells, the first such; None where none was named."""
    return min(devices, key=lambda device: sum(one.device == device for one in running), default=None)


def start(folder: Path, cell: Cell, plan: Study, threads: int, device: str | None) -> Running | None:
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
        state="starting",
        error=None,
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    with open(cell.folder / LOG, "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "protoseg.tasks.study_cell", str(cell.folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a Ctrl-C is for us; we hand it on
            pass_fds=(lock.fileno(),),  # should we be killed, the claim lives as long as the cell
        )
    print(f"{cell.name}: started" + (f" on GPU {device}" if device is not None else ""), flush=True)
    return Running(cell, process, lock, device, time.monotonic())


def finish(one: Running, stopped: bool) -> bool:
    """Say how a cell ended, and keep it where it failed; False if it did."""
    code, cell = one.process.returncode, one.cell
    took = f"{time.monotonic() - one.began:.0f} s"
    if code == 0:
        print(f"{cell.name}: done in {took}", flush=True)
        return True
    if stopped:
        print(f"{cell.name}: stopped after {took}", flush=True)
        return True
    lines = (cell.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    error = f"killed by {signal.Signals(-code).name}" if code < 0 else last or f"exit code {code}"
    note(cell.folder, state="failed", error=error[:500])
    print(f"{cell.name}: FAILED after {took}: {error} (see {cell.folder / LOG})", file=sys.stderr, flush=True)
    return False


class Signals:
    """SIGINT and SIGTERM are noted, to be handed on, while this is entered."""

    def __init__(self) -> None:
        self.came: list[int] = []
        self._handed = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
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
