"""`protoseg train`: recipe -> run folder.

    runs/NAME/
      config.yaml            the recipe, whole; `protoseg train --config` takes it again
      env.json               versions, machine, global batch, sizes of the data set
      metrics.csv            losses, learning rate, time per step; validation
      tensorboard/           the same for TensorBoard
      checkpoints/last.ckpt  to continue this run, and for nothing else
      best/                  the model folder with the highest validation mIoU
      final/                 the model folder of the last step: what tables of test results use

`best/` is chosen on the validation split, so its mIoU there is optimistic; `final/` is chosen by nobody.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
import platform
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.nn.parallel import DistributedDataParallel

from protoseg.config import Data, DataError, Recipe, UserError
from protoseg.data import catalog, loading, resident, transforms
from protoseg.data.catalog import Source
from protoseg.data.dataset import SegmentationDataset
from protoseg.data.resident import ResidentLoader
from protoseg.engine import optim, windows
from protoseg.engine.averaging import WeightAverage
from protoseg.engine.checkpoints import (
    AtomicFiles,
    Checkpoints,
    Interrupted,
    StopRequest,
    forget_signals,
    read_checkpoint,
)
from protoseg.engine.module import SegmentationModule
from protoseg.engine.reporting import ProgressBar, Reporter, on_terminal
from protoseg.engine.validation import Validation
from protoseg.models import build, saving

LAST = Path("checkpoints", "last.ckpt")
# What may differ between a run and its continuation. A longer `steps` stretches the schedule from there on,
# `evaluation` changes later validations; the rest changes no number.
FREE = (
    *("steps", "out", "resume", "devices", "nodes", "micro_batch", "accelerator"),
    *("val_every", "checkpoint_every", "checkpoint_minutes", "log_every", "evaluation"),
    *("data.root", "data.file", "data.workers", "data.cache", "data.max_pixels"),
    *("model.pretrained", "model.weights"),
)


def train(recipe: Recipe) -> Path:
    """Train a segmenter, or continue to.

    Args:
        recipe: the whole run. `recipe.resume` is "" (a new run), "auto" or the path of a checkpoint.

    Returns:
        The run folder.

    Raises:
        UserError: settings that do not fit together, a run folder that is in use or holds a run already, a checkpoint
            of another run, ten steps in a row without a finite loss.
        DataError: the data set cannot be read.
        SystemExit: 143 or 130 after SIGTERM or SIGINT; the checkpoint is written.
    """
    machine = Machine.of(recipe)
    check(recipe)
    run = Path(recipe.out)
    checkpoint = resume_from(recipe, first=machine.rank == 0)
    with locked(run) if machine.rank == 0 else _nothing():
        return _train(recipe, run, checkpoint, machine)


def _train(recipe: Recipe, run: Path, checkpoint: Path | None, machine: Machine) -> Path:
    training = catalog.find_training(recipe.data)
    validation = catalog.find(recipe.data, recipe.data.val_split) if recipe.data.val_split else None
    settings = settings_to_keep(recipe, machine)
    start = 0
    if checkpoint is not None:
        start = check_resume(checkpoint, settings, recipe.steps)

    seed_everything(recipe.seed, verbose=False)
    segmenter = build(recipe.model, recipe.head, training.labels.num_classes, training.labels.ignore_index)
    module = SegmentationModule(segmenter, recipe.optim, recipe.steps, seed=recipe.seed, evaluation=recipe.evaluation)
    if recipe.compile:
        module.compile_network()
    loader = training_batches(recipe, training, machine)
    if machine.rank == 0:  # all settings have been checked by now: nothing half-written is left behind
        start_folder(recipe, run, machine, training, validation)

    meta = {**describe(training, recipe.data), "evaluation": dataclasses.asdict(recipe.evaluation)}
    stop = StopRequest()
    terminal = on_terminal()
    reporter = Reporter(run / "metrics.csv", recipe.log_every, start, lines=not terminal)
    checkpoints = Checkpoints(
        run / LAST, recipe.checkpoint_every, recipe.val_every, stop, settings, recipe.checkpoint_minutes
    )
    average = WeightAverage(recipe.ema) if recipe.ema else None
    loaders: list[Any] = [loader.loader]
    callbacks: list[Callback] = [average] if average else []
    callbacks += [reporter, checkpoints]
    if validation is not None:

        def save_best(module: SegmentationModule, metrics: dict[str, float]) -> None:
            saving.save(module.model, run / "best", {**meta, "step": int(metrics["step"]), "metrics": plain(metrics)})

        batches = loading.evaluation_loader(
            SegmentationDataset(validation, transforms.evaluation(recipe.data)),
            rank=machine.rank,
            world=machine.world,
            workers=recipe.data.workers,
        )
        batches.worker_init_fn = forget_signals
        loaders.append(batches)
        callbacks.append(
            Validation(
                batches, recipe.val_every, save_best, reporter=reporter, checkpoints=checkpoints, average=average
            )
        )
    if terminal:
        callbacks.append(ProgressBar(reporter))

    with quiet_lightning():
        trainer = build_trainer(recipe, run, machine, callbacks, start)
    stop.install()
    try:
        with determinism(recipe, machine), quiet_lightning():
            trainer.fit(module, loader, ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True)
    except BaseException as reason:
        if stop.signal is not None and not isinstance(reason, Interrupted):
            raise stop.interruption() from reason  # the stop came where nothing could be saved: last.ckpt stands
        raise
    finally:
        for each in loaders:
            close(each)
        stop.restore()
    if trainer.is_global_zero:
        with average.applied(module) if average else _nothing():
            saving.save(segmenter, run / "final", {**meta, "step": int(trainer.global_step)})
        print(f"done: {run / 'final'} (last step)" + (f", {run / 'best'} (best on val)" if validation else ""))
    return run


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where a run happens.

    Args:
        accelerator: `cpu` or `gpu`.
        devices, nodes: processes per machine, machines.
        rank: of this process. Lightning starts the other processes itself unless torchrun or SLURM has.
        micro_batch: images per device and forward pass.
        accumulate: micro-batches per optimiser step.
    """

    accelerator: str
    devices: int
    nodes: int
    rank: int
    micro_batch: int
    accumulate: int

    @property
    def world(self) -> int:
        return self.devices * self.nodes

    @property
    def device(self) -> torch.device:
        """Where this rank's network is."""
        return torch.device("cpu") if self.accelerator == "cpu" else torch.device("cuda", self.rank % self.devices)

    @classmethod
    def of(cls, recipe: Recipe) -> Machine:
        """The machine a recipe asks for, refused where it is not there or the global batch does not divide.

        Raises:
            UserError: no GPU, too few of them, or batch_size != devices * nodes * micro_batch * accumulate.
        """
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        accelerator = recipe.accelerator if recipe.accelerator != "auto" else ("gpu" if gpus else "cpu")
        if accelerator == "gpu" and not gpus:
            raise UserError("accelerator is gpu but torch sees no CUDA device; choose cpu, or check nvidia-smi")
        devices, nodes = recipe.devices, recipe.nodes
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun decides how many there are
            devices = int(os.environ["LOCAL_WORLD_SIZE"])
            nodes = int(os.environ["WORLD_SIZE"]) // devices
        devices = devices or gpus or 1
        if devices < 0 or nodes < 1:
            raise UserError(f"devices {recipe.devices} and nodes {recipe.nodes} must be at least 1 (0 devices: all)")
        if accelerator == "gpu" and devices > gpus:
            raise UserError(f"devices is {devices} but torch sees {gpus} GPU(s); lower devices or use more nodes")
        if recipe.precision == "16-mixed" and accelerator == "cpu":
            raise UserError("precision 16-mixed needs a GPU; choose bf16-mixed or 32-true")
        world = devices * nodes
        micro = recipe.micro_batch or recipe.batch_size // world
        if micro < 1 or recipe.batch_size < 1 or recipe.batch_size % (micro * world):
            raise UserError(
                f"batch_size {recipe.batch_size} is the global batch and must be devices × nodes × micro_batch × a "
                f"whole number of accumulated micro-batches; given {devices} × {nodes} × {micro}. "
                "Change batch_size, micro_batch or devices"
            )
        return cls(accelerator, devices, nodes, global_rank(devices), micro, recipe.batch_size // (micro * world))


def global_rank(devices: int) -> int:
    """Of this process among all of the run, before they have met; 0 where nobody says.

    torchrun sets RANK and srun SLURM_PROCID; processes that Lightning starts know LOCAL_RANK, and NODE_RANK on several
    machines.
    """
    known = os.environ
    if "RANK" not in known and ("LOCAL_RANK" in known or "NODE_RANK" in known):
        return int(known.get("NODE_RANK", 0)) * devices + int(known.get("LOCAL_RANK", 0))
    return int(rank_zero_only.rank or 0)


def check(recipe: Recipe) -> None:
    """Refuse numbers no run can have.

    Raises:
        UserError: names the setting.
    """
    if recipe.steps < 1:
        raise UserError(f"steps must be at least 1, given {recipe.steps}")
    for name in ("val_every", "checkpoint_every", "checkpoint_minutes", "log_every", "seed"):
        if not getattr(recipe, name) >= 0:
            raise UserError(f"{name} must not be negative, given {getattr(recipe, name)}")
    optim.check(recipe.optim)
    windows.check(recipe.evaluation)
    if not 0 <= recipe.ema < 1:
        raise UserError(f"ema is the decay of a moving average and must lie in [0, 1), given {recipe.ema}")
    if recipe.data.workers < 0:
        raise UserError(f"data.workers must not be negative, given {recipe.data.workers}")
    if not recipe.out:
        raise UserError("out is empty; name the run folder, such as --out runs/first")


def resume_from(recipe: Recipe, first: bool = True) -> Path | None:
    """The checkpoint to continue from, None for a new run.

    Args:
        recipe: `out` and `resume` of it.
        first: whether this is rank 0; the others come when it has made the folder.

    Raises:
        UserError: the folder holds a run and `resume` does not say to continue it, or there is no such checkpoint.
    """
    run = Path(recipe.out)
    if recipe.resume == "auto":
        return run / LAST if (run / LAST).is_file() else None
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file; choose another run folder with --out")
    if recipe.resume:
        given = Path(recipe.resume)
        if not given.is_file():
            raise UserError(f"{given}: no such checkpoint; --resume takes `auto` or the path of a .ckpt file")
        if run.resolve() in given.resolve().parents or not _holds(run):
            return given
        raise UserError(f"{run} holds another run than {given}; choose a new folder with --out")
    if first and _holds(run):
        raise UserError(f"{run} is not empty; continue it with --resume auto or choose another folder with --out")
    return None


def _holds(run: Path) -> bool:
    return run.is_dir() and any(path.name != LOCK for path in run.iterdir())


def _begun(run: Path) -> bool:
    return any((run / name).exists() for name in (LAST, "metrics.csv", "best", "final"))


LOCK = ".lock"


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keep a second training out of a run folder. The lock dies with the process, so a killed run leaves none behind.

    Raises:
        UserError: another process trains there, or the folder cannot be written.
    """
    import fcntl  # not on Windows, where torch's data-parallel training is not either

    made = not run.exists()
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = open(run / LOCK, "w")  # noqa: SIM115 - held until the end of the run
    except OSError as fault:
        raise UserError(f"{run}: cannot write the run folder ({fault}); choose another with --out") from fault
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as fault:
            raise UserError(f"{run}: another training is running in this folder; choose another with --out") from fault
        refused = False
        try:
            yield
        except DataError:
            refused = True
            raise
        finally:
            (run / LOCK).unlink(missing_ok=True)
            # refused before anything was written, or by a picture before anything was learned worth a second look
            if made and (not _holds(run) or (refused and not _begun(run))):
                shutil.rmtree(run, ignore_errors=True)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def settings_to_keep(recipe: Recipe, machine: Machine) -> dict[str, Any]:
    """The settings a continued run must share with the one that wrote the checkpoint, as flat plain data."""
    kept = {name: value for name, value in flat(dataclasses.asdict(recipe)).items() if not _free(name)}
    return {**kept, "accumulate": machine.accumulate}


def _free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in FREE)


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": (1, 2)}} -> {"a.b": [1, 2]}"""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = list(value) if isinstance(value, tuple) else value
    return found


def check_resume(checkpoint: Path, settings: dict[str, Any], steps: int) -> int:
    """The optimiser step a checkpoint continues from.

    Raises:
        UserError: it is not a checkpoint, of other settings, or beyond the end of the run.
    """
    content = read_checkpoint(checkpoint)
    kept: dict[str, Any] = next(
        (state["settings"] for state in content["callbacks"].values() if "settings" in state), {}
    )
    usual = flat(dataclasses.asdict(Recipe()))  # of settings that did not exist when the checkpoint was written
    changed = [
        f"{name} was {kept.get(name, usual.get(name))!r}, now {value!r}"
        for name, value in sorted(settings.items())
        if kept.get(name, usual.get(name)) != value
    ]
    if changed:
        raise UserError(
            f"{checkpoint} continues only with its own settings: {'; '.join(changed)}. "
            "Put them back or start a new run with --out"
        )
    step = int(content["global_step"])
    if step > steps:
        raise UserError(f"{checkpoint} is at step {step}, beyond steps {steps}; raise steps or start a new run")
    return step


class Stream:
    """Epoch after epoch of a loader as one long epoch of `length` micro-batches.

    Lightning takes an optimiser step at the end of each epoch, complete or not; it must see none before the last step.
    """

    def __init__(self, loader: loading.ResumableLoader | ResidentLoader, length: int):
        self.loader = loader
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.loader

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)


def training_batches(recipe: Recipe, source: Source, machine: Machine) -> Stream:
    """All micro-batches of this rank.

    Raises:
        DataError: `data.resident`, and a picture that cannot be used or no room for all of them.
    """
    if recipe.data.resident:
        order = loading.BatchOrder(
            len(source), machine.micro_batch, recipe.seed, machine.rank, machine.world, machine.accumulate
        )
        pictures = resident.load(source, machine.device, recipe.data.workers)
        here = ResidentLoader(source, pictures, recipe.data, order, recipe.data.workers)
        return Stream(here, recipe.steps * machine.accumulate)
    loader = loading.training_loader(
        SegmentationDataset(source, transforms.training(recipe.data, source.labels, recipe.seed)),
        batch=machine.micro_batch,
        seed=recipe.seed,
        rank=machine.rank,
        world=machine.world,
        workers=recipe.data.workers,
        accumulate=machine.accumulate,
    )
    loader.worker_init_fn = forget_signals
    return Stream(loader, recipe.steps * machine.accumulate)


def close(loader: Any) -> None:
    """End the loader's processes now. Left to the garbage collector after an exception they may linger for seconds."""
    iterator: Any = getattr(loader, "_iterator", None)  # of persistent workers; torch has no public way to them
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
        loader._iterator = None


def build_trainer(recipe: Recipe, run: Path, machine: Machine, callbacks: list[Callback], start: int) -> Trainer:
    """Lightning's Trainer, with its own validation, checkpoints and data sampling off: those are ours."""
    strategy: Any = "auto"
    if machine.world > 1:
        # every rank adds the same sums to its prototypes, so there is nothing to broadcast; torch 2.15 renamed this
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        strategy = DDPStrategy(find_unused_parameters=False, **{option: False})
    return Trainer(
        accelerator=machine.accelerator,
        devices=machine.devices,
        num_nodes=machine.nodes,
        strategy=strategy,
        precision=recipe.precision,
        sync_batchnorm=machine.accelerator == "gpu" and machine.world > 1,
        max_steps=recipe.steps,
        max_epochs=-1,
        accumulate_grad_batches=machine.accumulate,
        gradient_clip_val=recipe.optim.clip or None,
        callbacks=callbacks,
        logger=TensorBoardLogger(run, name="", version="tensorboard", purge_step=start + 1 if start else None),
        plugins=[AtomicFiles()],
        use_distributed_sampler=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        enable_model_summary=False,
        default_root_dir=run,
    )


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's advertisements, and without the warnings that are about its own use of torch."""
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
            warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
            yield
    finally:
        logger.setLevel(before)


@contextmanager
def determinism(recipe: Recipe, machine: Machine) -> Iterator[None]:
    """torch's deterministic algorithms while a run lasts; on a GPU those without one warn instead of failing."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=machine.accelerator == "gpu")
    torch.backends.cudnn.benchmark = not recipe.deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark


def start_folder(recipe: Recipe, run: Path, machine: Machine, training: Source, validation: Source | None) -> None:
    """Write `config.yaml` and `env.json`; when a run continues, the earlier environments stay in the list."""
    (run / LAST).parent.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(dataclasses.asdict(recipe)))  # tuples become lists: plain YAML
    header = "# protoseg train --config THIS_FILE --out NEW_FOLDER\n"
    (run / "config.yaml").write_text(header + yaml.safe_dump({**settings, "resume": ""}, sort_keys=False))
    path = run / "env.json"
    earlier = json.loads(path.read_text()) if path.is_file() else []
    path.write_text(json.dumps([*earlier, environment(recipe, machine, training, validation)], indent=2) + "\n")


def environment(recipe: Recipe, machine: Machine, training: Source, validation: Source | None) -> dict[str, Any]:
    """What a number may depend on beside the recipe. No host name, no user name, no paths."""
    libraries = ("protoseg", "torch", "torchvision", "timm", "segmentation-models-pytorch", "lightning", "numpy")
    gpu = torch.cuda.get_device_name() if machine.accelerator == "gpu" else None
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in libraries}},
        "platform": platform.platform(),
        "commit": commit(),
        "accelerator": machine.accelerator,
        "device": gpu or platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "world": machine.world,
        "global_batch": recipe.batch_size,
        "micro_batch": machine.micro_batch,
        "accumulate": machine.accumulate,
        "train_items": len(training),
        "val_items": len(validation) if validation is not None else 0,
        "classes": training.labels.num_classes,
    }


def version_of(name: str) -> str | None:
    """Of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The git commit of the working directory, with "+changes" if files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def describe(source: Source, data: Data) -> dict[str, Any]:
    """What prediction needs to know of the data a model was trained on (`models.saving`)."""
    return {
        "names": list(source.labels.names),
        "palette": [list(colour) for colour in source.labels.palette],
        "ignore_index": source.labels.ignore_index,
        "base_size": data.base_size,
        "max_long_side": data.max_long_side,
        "dataset": data.name,
    }


def plain(metrics: dict[str, float]) -> dict[str, float | None]:
    """NaN as None: JSON has no NaN."""
    return {name: None if value != value else value for name, value in metrics.items() if name != "step"}
