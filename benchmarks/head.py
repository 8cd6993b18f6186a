"""One training step of the head: the release as written, our plain lines, our one pass, the floor, a softmax head.

    python -m benchmarks.head [--shape C150 ...] [--full] [--rounds 5] [--memory] [--compiled] [--device cuda [--tf32]]

One thread, process CPU time (so other work on the machine counts little; wall time on a GPU), contestants interleaved
in one process, medians; a ratio is the median of the rounds' ratios. A step is losses, gradient to the features and the
update of the prototypes, on features after the projection, channels last. The floor is two products of all pixels with
all prototypes, a band at a time, and one copy of the features. `--memory` adds the peak of one step over the resident
size before it, each contestant in its own process (on a GPU, whose allocator counts, in this one). There products and
convolutions are all full fp32, or all TF32 with `--tf32`; PyTorch's default mixes them. On a GPU `replayed` is the one
pass as a CUDA graph. The batch: about 20 classes in
tiles, 5 % void, features near planted prototypes. Real features may tie more, or hold more classes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from oracles.reference_loop import ReferenceHead
from protoseg import kernels
from protoseg.kernels import gemm, similarity
from protoseg.method.head import PrototypeHead
from protoseg.method.losses import Losses

K, VOID = 10, -1  # 255 is a class of 847


@dataclass(frozen=True)
class Shape:
    """`side`: feature rows and columns; `full_side` that of the published measurement; labels `up` times as many."""

    classes: int
    dim: int
    up: int = 1
    images: int = 2
    side: int = 64
    full_side: int = 128


SHAPES = {
    "C2": Shape(2, 256, 4),
    "C19": Shape(19, 256),
    "C19-up": Shape(19, 256, 4),
    "C19-D64": Shape(19, 64, 4),
    "C19-D720": Shape(19, 720),
    "C150": Shape(150, 256),
    "C150-up": Shape(150, 256, 4),
    "C150-D64": Shape(150, 64, 4),
    "C150-D720": Shape(150, 720),
    "C171": Shape(171, 256),
    "C847": Shape(847, 256, images=1),
    "C847-up": Shape(847, 256, 4, images=1),
}


class SoftmaxHead(nn.Module):
    """The parametric twin: one 1x1 convolution and cross-entropy."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.classify = nn.Conv2d(dim, classes, 1)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        scores = self.classify(features)
        if scores.shape[2:] != labels.shape[1:]:
            scores = F.interpolate(scores, size=labels.shape[1:], mode="bilinear", align_corners=False)
        return F.cross_entropy(scores, labels, ignore_index=VOID)


def made(dim: int, classes: int, device: str, **named: Any) -> PrototypeHead:
    """A head that takes its features as they are."""
    return PrototypeHead(dim, classes, projection="none", ignore_index=VOID, **named).to(device)


def batch(shape: Shape, side: int, device: str, prototypes: int = K) -> tuple[Tensor, Tensor, Tensor]:
    """(B, D, h, w) features, (B, H, W) labels, (C, K, D) the prototypes they lie near."""
    g = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(shape.classes, prototypes, shape.dim, generator=g), dim=-1)
    zipf = 1 / torch.arange(1, min(shape.classes, 20) + 1)
    present = torch.randperm(shape.classes, generator=g)[: len(zipf)]
    tiles = present[torch.multinomial(zipf, shape.images * 64, replacement=True, generator=g)].view(-1, 1, 8, 8)
    labels = F.interpolate(tiles.double(), size=(side * shape.up, side * shape.up)).long()[:, 0]
    small = F.interpolate(tiles.double(), size=(side, side)).long()[:, 0]
    which = torch.randint(prototypes, small.shape, generator=g)
    features = centres[small, which] + torch.randn(*small.shape, shape.dim, generator=g) * shape.dim**-0.5
    labels = torch.where(torch.rand(labels.shape, generator=g) < 0.05, VOID, labels)
    return features.to(device).permute(0, 3, 1, 2), labels.to(device), centres.to(device)


def contestants(shape: Shape, side: int, device: str, compiled: bool = False) -> dict[str, Callable[[], object]]:
    """name -> one step; `compiled` adds the release and our plain lines through `torch.compile`."""
    torch.manual_seed(0)
    features, labels, centres = batch(shape, side, device)
    features.requires_grad_(True)
    loop = ReferenceHead(shape.dim, shape.classes, K).to(device)
    loop.prototypes.data.copy_(centres)
    heads = {name: made(shape.dim, shape.classes, device, preset=name) for name in ("default", "paper", "reference")}
    for head in heads.values():
        head.prototypes.copy_(centres)
    twin = SoftmaxHead(shape.dim, shape.classes).to(device)
    flat, rows = centres.flatten(0, 1), features.detach().permute(0, 2, 3, 1).flatten(0, 2)
    transposed = flat.T.contiguous()
    width = similarity.band_columns(len(flat), similarity.budget_on(torch.device(device)))

    def ours(name: str, plain: bool = False, onednn: bool = True) -> Callable[[], None]:
        def step() -> None:
            features.grad = None
            takes = nullcontext() if onednn else mock.patch.object(gemm, "_onednn_takes", return_value=False)
            with kernels.plain_only() if plain else nullcontext(), takes:
                losses = heads[name].losses(features, labels)
                losses.total.backward()
                heads[name].update(losses)

        return step

    def parametric(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def step() -> None:
            features.grad = None
            loss(features, labels).backward()

        return step

    def floor(onednn: bool) -> Callable[[], None]:
        def step() -> None:
            with nullcontext() if onednn else mock.patch.object(gemm, "_onednn_takes", return_value=False):
                out = rows.clone()
                for start in range(0, len(rows), width):
                    cosines = gemm.similarities(flat, rows[start : start + width])
                    gemm.weighted_prototypes(cosines, flat, transposed, out[start : start + width])

        return step

    def plain_compiled() -> Callable[[], None]:
        head = heads["default"]
        made = torch.compile(lambda: _traced(head.losses(features, labels)), fullgraph=True)  # sees the plain lines

        def step() -> None:
            features.grad = None
            *parts, errors = made()
            losses = Losses(*parts, errors=errors)
            losses.total.backward()
            head.update(losses)

        return step

    steps: dict[str, Callable[[], object]] = {
        "release": parametric(partial(loop.loss, ignore_index=VOID)),
        "plain": ours("default", plain=True),
        "one pass": ours("default"),
        "one pass, mm": ours("default", onednn=False),
        "one pass, reference preset": ours("reference"),
        "one pass, paper preset": ours("paper"),
        "floor": floor(True),
        "floor, mm": floor(False),
        "softmax": parametric(twin.loss),
    }
    if compiled:
        steps |= {
            "release, compiled": parametric(partial(torch.compile(loop.loss), ignore_index=VOID)),
            "plain, compiled": plain_compiled(),
        }
    return steps


def _traced(losses: Losses) -> tuple[Any, ...]:
    """What `update` wants, as a compiler may return it."""
    parts = losses.total, losses.ce, losses.ppc, losses.ppd, losses.assignment, losses.embedding, losses.moving
    return *parts, losses.errors


def replayed(step: Callable[[], object]) -> Callable[[], object]:
    """The same step as one CUDA graph: what is left of it without its launches."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles, and makes what is kept between steps
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def clusterings(shape: Shape, side: int, device: str) -> dict[str, Callable[[], object]]:
    """The class loop of the release against clustering and update, both given the cosines they start from."""
    features, labels, centres = batch(shape, side, device)
    loop = ReferenceHead(shape.dim, shape.classes, K).to(device)
    loop.prototypes.data.copy_(centres)
    head = made(shape.dim, shape.classes, device)
    head.prototypes.copy_(centres)
    small = F.interpolate(labels[:, None].float(), size=(side, side), mode="nearest").view(-1)
    small = torch.where(small == VOID, -1.0, small)
    with torch.no_grad():
        x, masks, scores = loop.similarity(features)
        losses = head.losses(features, labels)
    masks.requires_grad_(True)
    classes = head._classes(labels, (side, side))
    own = masks.detach().gather(2, classes.clamp(min=0)[:, None, None].expand(-1, K, 1))[:, :, 0].contiguous()

    def ours() -> None:
        head._assign(own, None, classes, None, losses.embedding)
        head.update(losses)

    def released() -> None:
        with mock.patch.object(torch, "mm", return_value=None):  # its second similarity is not clustering
            loop.learn(x, scores, small, masks)

    return {"class loop": released, "clustering + update": ours}


def clock(device: str) -> float:
    """Seconds of CPU time; on a GPU of wall time, with its queue empty."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def timed(steps: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """name -> seconds of each round; one round more, dropped, warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = clock(device)
            step()
            if turn:
                seconds[name].append(clock(device) - start)
    return seconds


def ratio(over: list[float], under: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under))


class Counter(TorchDispatchMode):
    """Operations that do something: views excluded."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(step: Callable[[], object]) -> int:
    with Counter() as counter:
        step()
    return counter.count


def resident(field: str) -> int:
    """kB of `VmRSS` or `VmHWM`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}; --memory needs Linux")


def load_libraries() -> None:
    """What the first step of a process loads and compiles, 140 MB with PyTorch's compiler, by a step of four pixels."""
    head = PrototypeHead(4, 2, projection="none", embed_dim=4)
    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    losses = head.losses(features, torch.zeros(1, 2, 2, dtype=torch.int64))
    losses.total.backward()
    head.update(losses)


def same_precision(device: str, tf32: bool = False) -> None:
    """One precision of fp32 products on a GPU: by default PyTorch's convolutions are TF32 and its `mm` are not."""
    if device != "cpu":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32


def peak_of(step: Callable[[], object], device: str) -> float:
    """MB one step adds at its peak, in this process; on a CPU nothing larger was stepped before."""
    if device != "cpu":
        torch.mm(*torch.ones(2, 64, 64, device=device))  # the room cuBLAS takes once and keeps
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - allocated) / 2**20
    load_libraries()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step()
    return (resident("VmHWM") - before) / 1024


def record(path: str, about: dict[str, object], **found: object) -> None:
    """Print the machine, and write it with what was found as JSON where a path is given."""
    if path:
        Path(path).write_text(json.dumps({"machine": about, **found}, indent=1))
    print(json.dumps(about))


def machine(device: str) -> dict[str, object]:
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": len(cpu),
        "threads": torch.get_num_threads(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "fp32 products": torch.get_float32_matmul_precision(),
        "onednn": gemm.has_onednn(),
        "commit": commit.stdout.strip(),
    }


def measure(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    shape = SHAPES[name]
    side = shape.full_side if arguments.full else shape.side
    steps = contestants(shape, side, arguments.device, arguments.compiled)
    if arguments.device != "cpu":
        steps["one pass, replayed"] = replayed(steps["one pass"])
    seconds = timed(steps, arguments.rounds, arguments.device)
    clustering = clusterings(shape, side, arguments.device)
    loops = timed(clustering, arguments.rounds, arguments.device)
    ours = seconds["one pass"]
    found: dict[str, object] = {
        "shape": asdict(shape) | {"pixels": shape.images * side * side},
        "ms": {k: 1e3 * statistics.median(v) for k, v in {**seconds, **loops}.items()},
        "release / one pass": ratio(seconds["release"], ours),
        "release / one pass, mm": ratio(seconds["release"], seconds["one pass, mm"]),
        "release / one pass, reference preset": ratio(seconds["release"], seconds["one pass, reference preset"]),
        "release / one pass, paper preset": ratio(seconds["release"], seconds["one pass, paper preset"]),
        "one pass / one pass, paper preset": ratio(ours, seconds["one pass, paper preset"]),
        "plain / one pass": ratio(seconds["plain"], ours),
        "one pass / floor": ratio(ours, seconds["floor"]),
        "one pass, mm / floor, mm": ratio(seconds["one pass, mm"], seconds["floor, mm"]),
        "one pass / softmax": ratio(ours, seconds["softmax"]),
        "class loop / clustering + update": ratio(loops["class loop"], loops["clustering + update"]),
        "operations": {k: operations(v) for k, v in clustering.items()},
    }
    found |= {f"{name} / one pass": ratio(seconds[name], ours) for name in seconds if "compiled" in name}
    if "one pass, replayed" in seconds:
        found["release / one pass, replayed"] = ratio(seconds["release"], seconds["one pass, replayed"])
        found["one pass, replayed / floor"] = ratio(seconds["one pass, replayed"], seconds["floor"])
    if arguments.memory:
        found["peak MB"] = {}
        for contestant in ("release", "plain", "one pass", "softmax"):
            if arguments.device != "cpu":
                peak = peak_of(contestants(shape, side, arguments.device)[contestant], arguments.device)
                found["peak MB"][contestant] = peak  # type: ignore[index]
                continue
            command = [sys.executable, "-m", "benchmarks.head", "--shape", name, "--peak-of", contestant]
            command += ["--device", arguments.device]
            done = subprocess.run(
                command + ["--full"] * arguments.full, capture_output=True, text=True, check=True,
                cwd=Path(__file__).parents[1],
            )  # fmt: skip
            found["peak MB"][contestant] = float(done.stdout)  # type: ignore[index]
    return found


def show(name: str, found: dict) -> None:
    ms, peaks = found["ms"], found.get("peak MB", {})
    print(f"{name}: N={found['shape']['pixels']} C={found['shape']['classes']} D={found['shape']['dim']}")
    print("  ms   " + ", ".join(f"{k} {v:.1f}" for k, v in ms.items()))
    print("  ratio " + ", ".join(f"{k} {v:.2f}" for k, v in found.items() if isinstance(v, float)))
    print("  operations " + ", ".join(f"{k} {v}" for k, v in found["operations"].items()))
    if peaks:
        print("  peak MB " + ", ".join(f"{k} {v:.0f}" for k, v in peaks.items()), end="")
        print(f"; one pass / release {peaks['one pass'] / peaks['release']:.3f}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="128 x 128 features instead of 64 x 64")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--compiled", action="store_true", help="also the release and our plain lines in torch.compile")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tf32", action="store_true", help="on a GPU")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", default="")
    parser.add_argument("--peak-of", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    same_precision(arguments.device, arguments.tf32)
    if arguments.peak_of:
        shape = SHAPES[arguments.shape[0]]
        side = shape.full_side if arguments.full else shape.side
        print(peak_of(contestants(shape, side, arguments.device)[arguments.peak_of], arguments.device))
        return
    results = {}
    for name in arguments.shape:
        results[name] = measure(name, arguments)
        show(name, results[name])
    record(arguments.json, machine(arguments.device), results=results)


if __name__ == "__main__":
    main()
