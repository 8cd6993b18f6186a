"""`protoseg train`: from a recipe to a run folder (`run_folder`)."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from protoseg.config import Data, Recipe, UserError
from protoseg.data import catalog, loading, resident, transforms
from protoseg.data.catalog import Source
from protoseg.data.dataset import SegmentationDataset
from protoseg.data.resident import ResidentLoader
from protoseg.engine import optim, windows
from protoseg.engine.averaging import WeightAverage
from protoseg.engine.checkpoints import AtomicFiles, Checkpoints, Interrupted, StopRequest, forget_signals
from protoseg.engine.module import SegmentationModule
from protoseg.engine.reporting import ProgressBar, Reporter, on_terminal
from protoseg.engine.validation import Validation
from protoseg.models import build, saving
from protoseg.tasks.machine import Machine
from protoseg.tasks.run_folder import LAST, TooSmall, check_resume, locked, resume_from, settings_to_keep, start_folder


def train(recipe: Recipe) -> Path:
    """Train a segmenter, or continue to.

    Args:
        recipe: the whole run. `recipe.resume` is "" (a new run), "auto" or the path of a checkpoint.

    Returns:
        The run folder.

    Raises:
        UserError: settings that do not fit together, a run folder that is in use or holds a run already, a checkpoint
            of another run, batches too small for batch normalisation, ten steps in a row without a finite loss.
        DataError: the data set cannot be read.
        SystemExit: 143 or 130 after SIGTERM or SIGINT; the checkpoint is written.
    """
    machine = Machine.of(recipe)
    check(recipe)
    run = Path(recipe.out)
    checkpoint = resume_from(recipe, first=machine.rank == 0)
    with locked(run) if machine.rank == 0 else nullcontext():
        return _train(recipe, run, checkpoint, machine)


def _train(recipe: Recipe, run: Path, checkpoint: Path | None, machine: Machine) -> Path:
    training = catalog.find_training(recipe.data)
    validation = catalog.find_validation(recipe.data)
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
    loaders: list[Any] = [loader.processes]
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
        if isinstance(reason, ValueError) and "more than 1 value per channel" in str(reason):
            raise TooSmall(
                f"batch normalisation has one value a channel to look at: a micro-batch of {machine.micro_batch} "
                f"{'x'.join(map(str, recipe.data.crop_size))} crops is too small for {recipe.model.network}; raise "
                "batch_size (or micro_batch where it is set), or data.crop_size"
            ) from reason
        if stop.signal is not None and not isinstance(reason, Interrupted):
            raise stop.interruption() from reason  # the stop came where nothing could be saved: last.ckpt stands
        raise
    finally:
        for each in loaders:
            close(each)
        stop.restore()
    if trainer.is_global_zero:
        with average.applied(module) if average else nullcontext():
            saving.save(segmenter, run / "final", {**meta, "step": int(trainer.global_step)})
        # where no labelled pixel was seen in val there is no best
        best = f", {run / 'best'} (best on val)" if validation and (run / "best").is_dir() else ""
        print(f"done: {run / 'final'} (last step){best}")
    return run


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
    if recipe.model.freeze_backbone and not (recipe.model.pretrained or recipe.model.weights or recipe.resume):
        raise UserError("model.freeze_backbone keeps random weights; give model.weights or model.pretrained true")
    if recipe.data.workers < 0:
        raise UserError(f"data.workers must not be negative, given {recipe.data.workers}")
    if not recipe.out:
        raise UserError("out is empty; name the run folder, such as --out runs/first")


class Stream:
    """Epoch after epoch of a loader as one long epoch of `length` micro-batches.

    Lightning takes an optimiser step at the end of each epoch, complete or not; it must see none before the last step.
    """

    def __init__(self, loader: loading.ResumableLoader | ResidentLoader, length: int):
        self.loader = loader
        self.length = length
        self.processes = loader.cuts if isinstance(loader, ResidentLoader) else loader
        self.processes.worker_init_fn = forget_signals

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
    """torch's deterministic algorithms while a run lasts; on a GPU those without one warn instead of failing.

    Fresh memory is not filled with NaN first, as torch would do by default: that writes every table once more.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # whose attributes are made when it is imported
    fill = memory.fill_uninitialized_memory
    benchmark = torch.backends.cudnn.benchmark
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=machine.accelerator == "gpu")
        memory.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = not recipe.deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark


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
