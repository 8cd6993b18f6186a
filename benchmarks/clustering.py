"""Clustering and update alone: the release's class loop, our plain lines, the PyTorch lines and the operators behind
the door, and the plain lines through `torch.compile`.

    python -m benchmarks.clustering [--shape C150 ...] [--growth] [--compiled] [--rounds 9] [--memory] [--device cuda]

From the cosines of each pixel with its own class's prototypes to the assignment, the moved prototypes, the log of
their use and the re-seeding (the release logs and re-seeds nothing). The loop takes those cosines out of the table of
all, one class at a time; ours come from the pass that makes them, so "from the table" adds to ours one gather of all.
Both learn from all labelled pixels.

One thread, process CPU time (wall time on a GPU), contestants interleaved in one process, medians; a ratio is the
median of the rounds' ratios. Tiles of 8 x 8 pixels, classes by Zipf's law with every present one there, 5 % void,
features near planted prototypes. Operations are what PyTorch dispatches, views left out; one of ours is one call into C
with what it allocates inside. `--growth` goes up in C with the pixels held, `--compiled` adds minutes. `--memory` adds
the peak of one step over the resident size before it, each contestant in its own process (on a GPU, whose allocator
counts, in this one).
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.head import K, machine, made, operations, peak_of, ratio, record, timed
from oracles.reference_loop import ReferenceHead
from protoseg import kernels
from protoseg.kernels import clustering_cpu
from protoseg.method.losses import Errors, Losses

TILE = 8  # pixels a side


@dataclass(frozen=True)
class Shape:
    """`present` of the classes are in the batch."""

    pixels: int
    classes: int
    dim: int
    present: int


SHAPES = {
    "C2": Shape(32_768, 2, 256, 2),
    "C19": Shape(32_768, 19, 256, 19),
    "C19-D64": Shape(32_768, 19, 64, 19),
    "C19-D720": Shape(32_768, 19, 720, 19),
    "C150": Shape(32_768, 150, 256, 55),
    "C150-D720": Shape(32_768, 150, 720, 55),
    "C847": Shape(16_384, 847, 256, 68),
}
GROWTH = {f"C{c}-N2048": Shape(2_048, c, 256, min(c, 19)) for c in (19, 150, 847, 2_000, 5_000, 10_000)}


@dataclass(frozen=True)
class Problem:
    """(N, D) unit embedding, (N,) classes, -1 void, (C, K, D) prototypes, (N, K, C) cosines."""

    embedding: Tensor
    classes: Tensor
    prototypes: Tensor
    cosines: Tensor


def problem(shape: Shape, device: str) -> Problem:
    g = torch.Generator().manual_seed(0)
    prototypes = F.normalize(torch.randn(shape.classes, K, shape.dim, generator=g), dim=-1)
    zipf = 1 / torch.arange(1, shape.present + 1)
    tiles = torch.multinomial(zipf, shape.pixels // TILE**2, replacement=True, generator=g)
    tiles[: shape.present] = torch.arange(shape.present)[: len(tiles)]
    named = torch.randperm(shape.classes, generator=g)[: shape.present]
    classes = named[tiles[torch.randperm(len(tiles), generator=g)]].repeat_interleave(TILE**2)
    which = torch.randint(K, classes.shape, generator=g)
    noise = torch.randn(len(classes), shape.dim, generator=g) * shape.dim**-0.5
    embedding = F.normalize(prototypes[classes, which] + noise, dim=-1)
    classes[torch.rand(classes.shape, generator=g) < 0.05] = -1
    cosines = torch.einsum("nd,ckd->nkc", embedding, prototypes)
    return Problem(embedding.to(device), classes.to(device), prototypes.to(device), cosines.to(device))


def own_cosines(p: Problem) -> Tensor:
    """(N, K) of each pixel with the prototypes of its class."""
    return p.cosines.gather(2, p.classes.clamp(min=0)[:, None, None].expand(-1, K, 1))[:, :, 0]


def contestants(shape: Shape, device: str, compiled: bool) -> dict[str, Callable[[], object]]:
    """name -> one step."""
    p = problem(shape, device)
    total = torch.ones((), device=device)
    own = own_cosines(p)
    # What the losses leave to be moved by: any numbers cost the same.
    errors = Errors(taken=torch.randn_like(p.prototypes).flatten(0, 1), lacking=torch.rand_like(own[:, 0]))

    loop = ReferenceHead(shape.dim, shape.classes, K).to(device)
    loop.prototypes.data.copy_(p.prototypes)
    scores = F.one_hot(p.classes.clamp(min=0), shape.classes).float()[..., None, None]  # every pixel is right
    labels, masks = p.classes.float(), p.cosines.clone().requires_grad_(True)

    def released() -> None:
        with mock.patch.object(torch, "mm", return_value=None):  # its second similarity is not clustering
            loop.learn(p.embedding, scores, labels, masks)

    def ours(through: Callable = lambda step: step) -> Callable[..., None]:
        head = made(shape.dim, shape.classes, device)
        head.prototypes.copy_(p.prototypes)

        def step(own: Tensor, classes: Tensor, embedding: Tensor, total: Tensor) -> None:
            given, moving = head._assign(own, None, classes, None, embedding)
            head.update(Losses(total, total, total, total, given, embedding, moving, {}, errors))

        taken = through(step)
        return lambda own=own: taken(own, p.classes, p.embedding, total)

    plain, behind, door = ours(), ours(), ours()
    found = {"class loop": released, "plain lines": _within(plain, kernels.plain_only)}
    if compiled:
        through = ours(lambda step: torch.compile(step, fullgraph=True))
        found["plain lines, compiled"] = _within(through, kernels.plain_only)
    if device == "cpu":
        found["PyTorch lines"] = _within(behind, lambda: mock.patch.object(clustering_cpu, "takes", return_value=False))
    found["ours"] = door
    found["ours, from the table"] = lambda: door(own_cosines(p))
    return found


def _within(step: Callable[[], None], context: Callable) -> Callable[[], None]:
    def inside() -> None:
        with context():
            step()

    return inside


def peak(name: str, contestant: str, device: str) -> float:
    """MB one step adds at its peak; on a CPU in a process of its own."""
    if device != "cpu":
        return peak_of(contestants((SHAPES | GROWTH)[name], device, compiled=False)[contestant], device)
    command = [sys.executable, "-m", "benchmarks.clustering", "--shape", name, "--peak-of", contestant]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return float(done.stdout.splitlines()[-1])


def measure(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    shape = (SHAPES | GROWTH)[name]
    steps = contestants(shape, arguments.device, arguments.compiled)
    seconds = timed(steps, arguments.rounds, arguments.device)
    found: dict[str, object] = {
        "shape": asdict(shape),
        "ms": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "class loop over": {
            name: ratio(seconds["class loop"], values) for name, values in seconds.items() if name != "class loop"
        },
        "operations": {name: operations(step) for name, step in steps.items() if "compiled" not in name},
    }
    if arguments.memory:
        taken = [contestant for contestant in steps if "compiled" not in contestant]
        found["peak MB"] = {contestant: peak(name, contestant, arguments.device) for contestant in taken}
    return found


def show(name: str, found: dict) -> None:
    shape = found["shape"]
    print(f"{name}: N={shape['pixels']} C={shape['classes']} ({shape['present']} present) D={shape['dim']}")
    for step, ms in found["ms"].items():
        over = f"{found['class loop over'][step]:5.1f}x" if step in found["class loop over"] else ""
        mb = f"{found['peak MB'][step]:8.1f} MB" if step in found.get("peak MB", {}) else ""
        print(f"  {step:22} {ms:8.2f} ms {over:6} {found['operations'].get(step, '')!s:>6} operations {mb}".rstrip())
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", choices=SHAPES | GROWTH, default=list(SHAPES))
    parser.add_argument("--growth", action="store_true", help="instead: up to 10,000 classes at 2,048 pixels")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile of the plain lines")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", default="")
    parser.add_argument("--peak-of", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        steps = contestants((SHAPES | GROWTH)[arguments.shape[0]], arguments.device, compiled=False)
        ctypes.CDLL(None).malloc_trim(0)  # a heap that keeps nothing of what made the problem
        print(peak_of(steps[arguments.peak_of], arguments.device))
        return
    if arguments.device == "cpu" and not clustering_cpu.available():
        print("no C compiler: ours are the PyTorch lines")
    results = {}
    for name in GROWTH if arguments.growth else arguments.shape:
        results[name] = measure(name, arguments)
        show(name, results[name])
    where = machine(arguments.device) | {"compiled C": clustering_cpu.available()}
    record(arguments.json, where, results=results)


if __name__ == "__main__":
    main()
