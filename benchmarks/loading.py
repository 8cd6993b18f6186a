"""How many training samples a second each way of loading makes, and what whole training steps reach with them.

    python -m benchmarks.loading [--half] [--device cuda] [--batch 16] [--rounds 5] [--workers 0] [--json out.json]
    python -m benchmarks.loading --steps 40 [--device cuda] [--precision bf16-mixed] [--compile] ...

CamVid from the folder in PROTOSEG_CAMVID, else generated scenes of its size. One thread and no loader processes unless
`--workers` says so. Contestants take turns batch by batch in one process; medians, and ratios of the same rounds; CPU
time on a CPU, where other work on the machine then counts little, wall time up to the end of the GPU's work on a GPU.
`--steps` trains for real (`protoseg train`: Lightning, prototypes, reports) and takes the median time of the second
half of the steps from `metrics.csv`, once for each way of loading; every report is printed, so that a run which is cut
off has said how far it was. `--profile` trains a second time and lists what took longest.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from protoseg.config import Data, Head, Model, Optim, Recipe
from protoseg.data import catalog, loading, resident, transforms
from protoseg.data.dataset import SegmentationDataset
from protoseg.tasks.training import train

Batches = Iterator[dict[str, Any]]
WAYS = ("files", "cached", "resident")


def settings(half: bool, limit: int | None, workers: int) -> Data:
    """The data section of `recipes/camvid-scratch-full.yaml`, or of `camvid-scratch.yaml`."""
    cut: dict[str, Any] = {"crop_size": (360, 480), "scale_range": (0.5, 2.0)}
    if half:
        cut = {"base_size": 180, "crop_size": (160, 224), "scale_range": (0.75, 1.75)}
    if os.environ.get("PROTOSEG_CAMVID"):
        return Data(name="camvid", limit=limit, workers=workers, **cut)
    return Data(name="synthetic", length=limit or 64, workers=workers, **cut)


def contestants(data: Data, batch: int, device: torch.device) -> dict[str, Callable[[], Batches]]:
    """Name -> an endless stream of batches on the device."""
    source = catalog.find(data, "train")

    def files(cache: bool) -> Callable[[], Batches]:
        def stream() -> Batches:
            dataset = SegmentationDataset(source, transforms.training(data, source.labels, 0), cache)
            loader = loading.training_loader(dataset, batch=batch, seed=0, workers=data.workers)
            while True:
                for made in loader:
                    moved = {name: made[name].to(device, non_blocking=True) for name in ("image", "label")}
                    yield {**made, **moved}

        return stream

    def memory() -> Batches:
        start = time.perf_counter()
        pictures = resident.load(source, device, data.workers)
        print(f"{len(source)} pairs decoded onto {device} in {time.perf_counter() - start:.1f} s")
        loader = resident.ResidentLoader(
            source, pictures, data, loading.BatchOrder(len(source), batch, 0), data.workers
        )
        while True:
            yield from loader

    return {"files": files(False), "cached": files(True), "resident": memory}


def rates(streams: dict[str, Batches], batch: int, rounds: int, each: int, device: torch.device) -> dict[str, Any]:
    """Images a second of each stream, `each` batches a round, and how many times faster than the first it is."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    found: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(rounds):
        for name, stream in streams.items():
            start = clock()
            for _ in range(each):
                next(stream)
            if device.type == "cuda":
                torch.cuda.synchronize()
            found[name].append(each * batch / (clock() - start))
    first = next(iter(found.values()))
    return {
        name: {
            "images_per_second": statistics.median(values),
            "times_the_first": statistics.median(a / b for a, b in zip(values, first)),
        }
        for name, values in found.items()
    }


def trained(data: Data, arguments: argparse.Namespace) -> dict[str, float]:
    """ms_per_step, data_ms and images a second of the later half of a short real run."""
    with tempfile.TemporaryDirectory() as folder:
        every = max(1, arguments.steps // 20)
        recipe = Recipe(
            data=data,
            model=Model(network="tiny"),
            head=Head(embed_dim=128),
            optim=Optim(name="adamw", lr=2e-3),
            steps=arguments.steps,
            batch_size=arguments.batch,
            val_every=0,
            checkpoint_every=0,
            log_every=every,
            accelerator="gpu" if arguments.device == "cuda" else "cpu",
            precision=arguments.precision,
            compile=arguments.compile,
            deterministic=not arguments.fast,
            out=str(Path(folder, "run")),
        )
        # no validation: an empty name of the split says so
        recipe = replace(recipe, data=replace(data, val_split=""))
        run = train(recipe)
        with open(run / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        if arguments.profile:
            profiled(replace(recipe, out=str(Path(folder, "again"))))
    later = [row for row in rows if int(row["step"]) > arguments.steps // 2]
    step, waiting = (statistics.median(float(row[name]) for row in later) for name in ("ms_per_step", "data_ms"))
    return {"ms_per_step": step, "data_ms": waiting, "images_per_second": 1000 * arguments.batch / step}


def profiled(recipe: Recipe) -> None:
    """Train, and print what took longest: on a GPU its kernels, and everywhere what the processor did."""
    columns = ["self_cpu_time_total"]
    if torch.cuda.is_available():
        columns.append("self_cuda_time_total")
    with torch.profiler.profile() as profile:  # of all there is
        train(recipe)
    for column in columns:
        print(profile.key_averages().table(sort_by=column, row_limit=30, max_name_column_width=60))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", action="store_true", help="180 x 240, as camvid-scratch.yaml")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--way", nargs="*", choices=WAYS, default=list(WAYS), help="--steps knows no `files`")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--each", type=int, default=2, help="batches a round")
    parser.add_argument("--limit", type=int, default=None, help="use only so many pairs")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="train so many steps instead")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--fast", action="store_true", help="without deterministic algorithms")
    parser.add_argument("--profile", action="store_true", help="with --steps")
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    data = settings(arguments.half, arguments.limit, arguments.workers)
    if arguments.steps:
        ways = {"cached": replace(data, cache=True), "resident": replace(data, resident=True)}
        results: dict[str, Any] = {n: trained(each, arguments) for n, each in ways.items() if n in arguments.way}
        print("| loading | ms a step | of it waiting for data | images/s |\n|---|---|---|---|")
        for name, row in results.items():
            print("| {} | {ms_per_step:.1f} | {data_ms:.1f} | {images_per_second:.0f} |".format(name, **row))
    else:
        made = contestants(data, arguments.batch, device)
        streams = {name: made[name]() for name in arguments.way}
        rates(streams, arguments.batch, 1, len(catalog.find(data, "train")) // arguments.batch, device)  # fills caches
        results = rates(streams, arguments.batch, arguments.rounds, arguments.each, device)
        print("| loading | images/s | times the first |\n|---|---|---|")
        for name, row in results.items():
            print("| {} | {images_per_second:.0f} | {times_the_first:.2f} |".format(name, **row))
    if arguments.json:
        facts = {"torch": torch.__version__, "machine": platform.platform(), **vars(arguments), "results": results}
        Path(arguments.json).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
