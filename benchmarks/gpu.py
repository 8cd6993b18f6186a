"""The Triton kernels: what each way of taking products costs, which sizes of blocks are fastest, how far results move.

    python -m benchmarks.gpu [--shape C150 ...] [--way mm tf32 ...] [--side 256] [--blocks] [--json out.json]

Wall time with an empty queue, medians, contestants interleaved. For every shape and way: one step of the head (losses,
gradient to the features, update), its two kernels alone, the relative difference of the gradient from `off` on pixels
whose two best prototypes of every class are 1e-4 apart, and the share of other assignments. `off` is the plain PyTorch
bands. The floor is two bare products in the same precision. `--blocks` tries every size of blocks that compiles and
prints the fastest: what `blocks` in `protoseg/kernels/gpu/similarity.py` should hold for that shape and GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks.head import SHAPES, K, Shape, batch, clock, machine, timed
from protoseg.kernels import gpu
from protoseg.method.head import PrototypeHead

WAYS = ("off", "mm", "ieee", "tf32x3", "tf32", "bf16")
CLEAR = 1e-4


def taken(way: str) -> mock._patch_dict:
    return mock.patch.dict(os.environ, {gpu.VARIABLE: way})


def steps(shape: Shape, side: int, device: str, ways: list[str]) -> dict[str, Callable[[], object]]:
    """way -> one step by it, and `floor <precision>` -> two products."""
    features, labels, centres = batch(shape, side, device)
    features.requires_grad_(True)
    head = PrototypeHead(shape.dim, shape.classes, projection="none", embed_dim=shape.dim).to(device)
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
            before = torch.backends.cuda.matmul.fp32_precision
            torch.backends.cuda.matmul.fp32_precision = precision
            width = max(1, 64_000_000 // len(flat))
            for start in range(0, len(rows), width):
                torch.mm(torch.mm(rows[start : start + width], flat.T), flat)
            torch.backends.cuda.matmul.fp32_precision = before

        return step

    found: dict[str, Callable[[], object]] = {way: by(way) for way in ways}
    found["floor fp32"] = floor("ieee", torch.float32)
    found["floor tf32"] = floor("tf32", torch.float32)
    found["floor bf16"] = floor("ieee", torch.bfloat16)
    return found


def difference(shape: Shape, side: int, device: str, ways: list[str]) -> dict[str, dict[str, float]]:
    """way -> how far its gradient and assignments are from `off`."""
    features, labels, centres = batch(shape, side, device)
    head = PrototypeHead(shape.dim, shape.classes, projection="none", embed_dim=shape.dim).to(device)
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
    n = min(len(rows), 64_000_000 // (shape.classes * (K if way == "mm" else 1)))
    classes = torch.randint(shape.classes, (len(rows),), device=device)
    cosines = Cosines(way, rows, centres, classes, None, 0.1, True)
    cosines.fill(None, 0, len(rows))
    best, seen = cosines.nearest(0, n)
    slope, share = torch.randn_like(best), torch.rand(n, device=device)
    out = torch.empty(n, shape.dim, device=device)
    return {
        f"{way}: nearest of {n} pixels": lambda: cosines.nearest(0, n),
        f"{way}: gradient of {n} pixels": lambda: cosines.gradient(slope, seen, share, 0, n, out),
    }


def best_blocks(shape: Shape, side: int, device: str, way: str, rounds: int) -> None:
    """Try all sizes; those that do not compile, or do not fit the GPU, say so."""
    from protoseg.kernels.gpu import similarity

    wide = max(16, 1 << (shape.dim - 1).bit_length())
    for place, backward in enumerate((False, True)):
        found = []
        sizes = itertools.product(
            (64, 128), (16, 32, 64, 128), {min(wide, 256), 64, 32}, {min(wide, 256), 128} if backward else {16},
            (4, 8), (2, 3),
        )  # fmt: skip
        for size in sizes:
            tried = similarity.Blocks(*size)
            usual = similarity.blocks

            def chosen(way, classes, dim, *, backward, tried=tried, usual=usual, wanted=bool(place)):
                return tried if backward == wanted else usual(way, classes, dim, backward=backward)

            with mock.patch.object(similarity, "blocks", chosen):
                try:
                    step = list(parts(shape, side, device, way).values())[place]
                    step()
                    seconds = []
                    for _ in range(rounds):
                        start = clock(device)
                        step()
                        seconds.append(clock(device) - start)
                except Exception as reason:  # whatever a compiler or driver may raise at a size too large
                    print(f"  {tried}: {type(reason).__name__}", flush=True)
                    continue
            found.append((statistics.median(seconds), tried))
        for seconds_taken, tried in sorted(found, key=lambda pair: pair[0])[:5]:
            print(f"  {'gradient' if place else 'nearest'} {1e3 * seconds_taken:.3f} ms {tried}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", choices=SHAPES, default=["C19", "C150", "C150-up", "C150-D720", "C847"])
    parser.add_argument("--way", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--side", type=int, default=256, help="feature rows and columns, a multiple of 8")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--blocks", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    where = (arguments.side, arguments.device)
    results = {}
    for name in arguments.shape:
        shape = SHAPES[name]
        print(f"{name}: N={shape.images * arguments.side**2} C={shape.classes} D={shape.dim}", flush=True)
        if arguments.blocks:
            for way in arguments.way:
                if way not in ("off", "mm"):
                    print(f" {way}")
                    best_blocks(shape, *where, way, arguments.rounds)
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
    if arguments.json:
        Path(arguments.json).write_text(
            json.dumps({"machine": machine(arguments.device), "results": results}, indent=1)
        )
    print(json.dumps(machine(arguments.device)))


if __name__ == "__main__":
    main()
