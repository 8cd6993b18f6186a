"""The Triton kernels: what each way of taking products costs, which sizes of blocks are fastest, how far results move.

    python -m benchmarks.gpu [--shape C150 ...] [--way mm tf32 ...] [--side 256] [--json out.json]
    python -m benchmarks.gpu --blocks [--seconds 60] [--shape C150 ...] [--way tf32 ...] [--json out.json]

Wall time with an empty queue, medians, contestants interleaved. For every shape and way: one step of the head (losses,
gradient to the features, update), its two kernels alone, the relative difference of the gradient from `off` on pixels
whose two best prototypes of every class are 1e-4 apart, and the share of other assignments. `off` is the plain PyTorch
bands. The floor is two bare products in the same precision. `--blocks` looks for the fastest sizes of blocks, from
those in use one size at a time, as each costs seconds of compiling: what `blocks` in
`protoseg/kernels/gpu/similarity.py` should hold for that shape and GPU. It times the kernels alone, of `mm` without
PyTorch's products, and stops after `--seconds` for each shape, way and kernel.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from typing import TYPE_CHECKING
from unittest import mock

import torch
from torch import Tensor

from benchmarks.head import SHAPES, K, Shape, machine, made, record, same_precision, timed
from benchmarks.head import batch as new_batch
from protoseg.kernels import gpu

if TYPE_CHECKING:
    from protoseg.kernels.gpu.similarity import Blocks

WAYS = ("off", "mm", "ieee", "tf32", "bf16")
CLEAR = 1e-4
QUEUED = 4  # launches that are timed together in `--blocks`, so that the kernels hide what launching takes


@lru_cache(maxsize=1)
def batch(shape: Shape, side: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Made once, on the CPU: that takes longer than all steps with it."""
    return new_batch(shape, side, device)


def taken(way: str) -> mock._patch_dict:
    return mock.patch.dict(os.environ, {gpu.VARIABLE: way})


def steps(shape: Shape, side: int, device: str, ways: list[str]) -> dict[str, Callable[[], object]]:
    """way -> one step by it, and `floor <precision>` -> two products."""
    features, labels, centres = batch(shape, side, device)
    features = features.detach().requires_grad_(True)
    head = made(shape.dim, shape.classes, device)
    head.prototypes.copy_(centres)

    def by(way: str) -> Callable[[], None]:
        def step() -> None:
            features.grad = None
            with taken(way):
                losses = head.losses(features, labels)
                losses.total.backward()
                head.update(losses)

        return step

    def floor(precision: str, dtype: torch.dtype) -> Callable[[], None]:
        rows = features.detach().permute(0, 2, 3, 1).flatten(0, 2).to(dtype)
        flat = centres.flatten(0, 1).to(dtype)

        def step() -> None:
            torch.set_float32_matmul_precision(precision)
            width = max(1, 64_000_000 // len(flat))
            for start in range(0, len(rows), width):
                torch.mm(torch.mm(rows[start : start + width], flat.T), flat)
            torch.set_float32_matmul_precision("highest")

        return step

    found: dict[str, Callable[[], object]] = {way: by(way) for way in ways}
    found["floor fp32"] = floor("highest", torch.float32)
    found["floor tf32"] = floor("high", torch.float32)
    found["floor bf16"] = floor("highest", torch.bfloat16)
    return found


def difference(shape: Shape, side: int, device: str, ways: list[str]) -> dict[str, dict[str, float]]:
    """way -> how far its gradient and assignments are from `off`."""
    features, labels, centres = batch(shape, side, device)
    head = made(shape.dim, shape.classes, device)
    head.prototypes.copy_(centres)

    def result(way: str) -> tuple[Tensor, Tensor]:
        leaf = features.detach().requires_grad_(True)
        with taken(way):
            losses = head.losses(leaf, labels)
            losses.total.backward()
        assert leaf.grad is not None
        assert losses.assignment is not None
        return leaf.grad.permute(0, 2, 3, 1).flatten(0, 2), losses.assignment.flatten()

    true, assigned = result("off")
    with torch.no_grad():
        unit, flat = head.embed(features), head.prototypes.flatten(0, 1)
        gaps = []
        for rows in unit.split(4096):
            best = (rows @ flat.T).unflatten(1, (shape.classes, K)).topk(2, 2).values
            gaps.append((best[..., 0] - best[..., 1]).amin(1))
        clear = (torch.cat(gaps) > CLEAR).to(true.dtype)[:, None]
    found = {}
    for way in ways:
        gradient, assignment = result(way)
        found[way] = {
            "clear pixels": float(clear.mean()),
            "gradient, clear": float(((gradient - true) * clear).norm() / (true * clear).norm()),
            "gradient, all": float((gradient - true).norm() / true.norm()),
            "assignments differ": float((assignment != assigned).float().mean()),
        }
    return found


def parts(shape: Shape, side: int, device: str, way: str) -> dict[str, Callable[[], object]]:
    """The two kernels of a band, with the table's product where `way` is `mm`."""
    from protoseg.kernels.gpu.similarity import Cosines

    features, _, centres = batch(shape, side, device)
    rows = torch.nn.functional.normalize(features.permute(0, 2, 3, 1).flatten(0, 2)).contiguous()
    n = min(len(rows), 64_000_000 // (shape.classes * (K if way == "mm" else 1)) // 128 * 128)
    classes = torch.randint(shape.classes, (len(rows),), device=device)
    cosines = Cosines(way, rows, centres, classes, None, 0.1, True)
    cosines.fill(None, 0, len(rows))
    best, seen = cosines.nearest(0, n)
    slope = torch.randn_like(best)
    cosines.push(torch.rand((), device=device), 1.0)
    out = torch.empty(n, shape.dim, device=device)
    return {
        f"{way}: nearest of {n} pixels": lambda: cosines.nearest(0, n),
        f"{way}: gradient of {n} pixels": lambda: cosines.gradient(slope, seen, 0, n, out),
    }


def bare(shape: Shape, side: int, device: str, way: str) -> dict[str, Callable[[], object]]:
    """nearest, gradient -> the kernel of a band alone, on random rows whose labels come in runs as in images."""
    from protoseg.kernels.gpu import similarity

    n = shape.images * side**2
    n = min(n, 64_000_000 // (shape.classes * (K if way == "mm" else 1)) // 128 * 128)
    rows = torch.nn.functional.normalize(torch.randn(n, shape.dim, device=device))
    centres = torch.nn.functional.normalize(torch.randn(shape.classes, K, shape.dim, device=device), dim=2)
    classes = torch.randint(shape.classes, (-(-n // 32),), device=device).repeat_interleave(32)[:n]
    cosines = similarity.Cosines(way, rows, centres, classes, None, 0.1, True)
    cosines.fill(None, 0, n)
    best, seen = cosines.nearest(0, n)
    table = seen[1] if cosines.tabled else best
    # Small, as the gradient leaves weights in the table and is timed on these again: they must not grow.
    slope = 1e-3 * torch.randn_like(best)
    cosines.push(1e-3 * torch.rand((), device=device), 1.0)
    out = torch.empty_like(rows)
    return {
        "nearest": lambda: similarity.run_nearest(cosines, 0, n, table, best, seen[0], own=True, losses=True),
        "gradient": lambda: similarity.run_weights(cosines, slope, seen, 0, n, out),
    }


def sizes_to_try(shape: Shape, way: str, *, backward: bool) -> dict[str, tuple[int, ...]]:
    """Field of `Blocks` -> what it may be, those that matter most first."""
    few = max(16, 1 << (shape.classes - 1).bit_length())
    classes = tuple(c for c in (16, 32, 64, 128) if c <= few)
    programs = (264, 792, 1584, 3168)
    if way == "mm":  # no product, hence no channels, and nothing that Triton would fetch ahead in stages
        choices: dict[str, tuple[int, ...]] = {"warps": (2, 4, 8), "rows": (32, 64, 128, 256), "classes": classes[:3]}
        return choices | {"programs": programs}
    wide = min(256, max(16, 1 << (shape.dim - 1).bit_length()))
    choices = {"classes": classes, "warps": (4, 8), "rows": (64, 128)}
    if backward:
        choices["out"] = tuple(sorted({wide, 128}))
    return choices | {"stages": (1, 2, 3), "channels": tuple(sorted({wide, 64, 32})), "programs": programs}


def search(
    start: Blocks, choices: dict[str, tuple[int, ...]], measure: Callable[[Blocks], float | None], until: float
) -> list[tuple[float, Blocks]]:
    """Better and better sizes, one at a time from `start`, until none is better or the clock says `until`.

    Args:
        choices: field of `Blocks` -> what it may be.
        measure: seconds, or None where the sizes do not work.

    Returns:
        All that worked, the fastest first.
    """
    known = {start: measure(start)}
    best, at = start, known[start]
    moved = True
    while moved:
        moved = False
        for field, values in choices.items():
            for value in values:
                tried = replace(best, **{field: value})
                if tried in known:
                    continue
                if time.monotonic() > until:
                    return _fastest(known)
                known[tried] = seconds = measure(tried)
                if seconds is not None and (at is None or seconds < at):
                    best, at, moved = tried, seconds, True
    return _fastest(known)


def _fastest(known: dict[Blocks, float | None]) -> list[tuple[float, Blocks]]:
    return sorted(((s, b) for b, s in known.items() if s is not None), key=lambda pair: pair[0])


def best_blocks(
    shape: Shape, side: int, device: str, way: str, rounds: int, seconds: float
) -> dict[str, list[dict[str, float]]]:
    """nearest, gradient -> sizes and ms, the fastest first."""
    from protoseg.kernels.gpu import similarity

    usual = similarity.blocks
    found: dict[str, list[dict[str, float]]] = {}
    for (name, step), backward in zip(bare(shape, side, device, way).items(), (False, True), strict=True):

        def measure(tried: Blocks, step: Callable[[], object] = step) -> float | None:
            with mock.patch.object(similarity, "blocks", return_value=tried):
                try:
                    queued = {"": lambda: [step() for _ in range(QUEUED)]}
                    return statistics.median(timed(queued, rounds, device)[""]) / QUEUED
                except Exception as reason:  # whatever a compiler or driver may raise at a size too large
                    print(f"  {tried}: {type(reason).__name__}", flush=True)
                    return None

        start = usual(way, shape.classes, shape.dim, backward=backward)
        choices = sizes_to_try(shape, way, backward=backward)
        fastest = search(start, choices, measure, time.monotonic() + seconds)
        now = next((s for s, b in fastest if b == start), float("nan"))
        print(f"  {name}: in use {start} {1e3 * now:.3f} ms; of {len(fastest)} tried")
        for each, sizes in fastest[:3]:
            print(f"    {1e3 * each:.3f} ms {sizes}", flush=True)
        found[name] = [{"ms": 1e3 * each, **asdict(sizes)} for each, sizes in fastest]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", choices=SHAPES, default=["C19", "C150", "C150-up", "C150-D720", "C847"])
    parser.add_argument("--way", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--side", type=int, default=256, help="feature rows and columns, a multiple of 8")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--blocks", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0, help="of --blocks, for each shape, way and kernel")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    where = (arguments.side, arguments.device)
    same_precision(arguments.device)
    results: dict[str, dict] = {}
    for name in arguments.shape:
        shape = SHAPES[name]
        print(f"{name}: N={shape.images * arguments.side**2} C={shape.classes} D={shape.dim}", flush=True)
        if arguments.blocks:
            for way in arguments.way:
                if way != "off":
                    print(f" {way}")
                    found = best_blocks(shape, *where, way, arguments.rounds, arguments.seconds)
                    results.setdefault(name, {})[way] = found
            continue
        contestants = steps(shape, *where, arguments.way)
        for way in arguments.way:
            if way != "off":
                contestants |= parts(shape, *where, way)
        ms = {k: 1e3 * statistics.median(v) for k, v in timed(contestants, arguments.rounds, arguments.device).items()}
        moved = difference(shape, *where, [way for way in arguments.way if way != "off"])
        print("  ms " + ", ".join(f"{k} {v:.3f}" for k, v in ms.items()))
        for way, numbers in moved.items():
            print(f"  {way}: " + ", ".join(f"{k} {v:.2g}" for k, v in numbers.items()), flush=True)
        results[name] = {"ms": ms, "against off": moved}
    record(arguments.json, machine(arguments.device), results=results)


if __name__ == "__main__":
    main()
