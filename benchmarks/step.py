"""A whole training step of a network: the prototype head beside the softmax head and the 2022 head, all behind the same
projection.

    python -m benchmarks.step [--rounds 3] [--batch 2] [--size 512] [--memory] [--json out.json]
    python -m benchmarks.step --device cuda --amp --batch 16 --rounds 20 --memory

ResNet-50 + FPN, 150 classes, random weights and images, labels in tiles. A step is features, losses, backward, SGD and
the update of the prototypes. One thread and process CPU time (wall time on a GPU), contestants interleaved in one
process, medians; a ratio is the median of the rounds' ratios. The times of the parts come from rounds of their own, as
a clock between the parts makes a GPU wait.

The softmax head takes its cross-entropy with PyTorch's own resize and loss. `softmax, strips` is the same head with the
cross-entropy that the prototype head uses, a strip of label rows at a time: the comparison without that advantage.
`release` is the 2022 head as written, with its class loop; it moves its prototypes among the losses.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.head import K, clock, machine, peak_of, ratio, record, resident, timed
from oracles.reference_loop import ReferenceHead
from protoseg.config import Head, Model
from protoseg.kernels import similarity, upsampling
from protoseg.method.losses import Losses
from protoseg.models import Segmenter, build
from protoseg.models.softmax_head import SoftmaxHead

CLASSES, VOID = 150, 255
CONTESTANTS = ("prototype", "softmax", "softmax, strips", "release")
PARTS = ("features", "losses", "backward", "update", "optimiser")


class StripCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of (B, C, h, w) scores at label size; its gradient is made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, labels: Tensor) -> Tensor:
        (B, C, h, w), (H, W) = scores.shape, labels.shape[1:]
        kind = (False, scores.dtype, scores.device)
        vertical, across = upsampling.lines(h, H, *kind), upsampling.lines(w, W, *kind)
        share = (labels != VOID).sum().clamp(min=1).to(scores.dtype).reciprocal()
        budget = similarity.budget_on(scores.device)
        loss, gradient = scores.new_zeros(()), torch.empty_like(scores, memory_format=torch.contiguous_format)
        for b in range(B):
            widened = upsampling.widen(scores[b].reshape(-1, w), across).view(C, h, W)
            wide = torch.zeros_like(widened)
            loss += upsampling.strip_cross_entropy(
                widened, wide, vertical, (0, H), 0, labels[b : b + 1], VOID, None, share, budget
            )
            gradient[b] = upsampling.narrow(wide.view(-1, W), across).view(C, h, w)
        ctx.save_for_backward(gradient)
        return loss * share

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (made,) = ctx.saved_tensors
        return made * gradients[0], None


class StripSoftmaxHead(SoftmaxHead):
    """`SoftmaxHead` with `StripCrossEntropy`."""

    def losses(self, features: Tensor, labels: Tensor) -> Losses:
        scores = self(features)
        with torch.autocast(features.device.type, enabled=False):
            return Losses.cross_entropy_only(StripCrossEntropy.apply(scores.float(), labels))


class ReleaseHead(nn.Module):
    """The 2022 head behind a projection."""

    def __init__(self, projection: nn.Module, embed_dim: int):
        super().__init__()
        self.projection, self.loop = projection, ReferenceHead(embed_dim, CLASSES, K)

    def losses(self, features: Tensor, labels: Tensor) -> Losses:
        projected = self.projection(features)
        with torch.autocast(features.device.type, enabled=False):
            return Losses.cross_entropy_only(self.loop.loss(projected.float(), labels, VOID))

    def update(self, losses: Losses) -> None:
        """`losses` has moved the prototypes."""


def network(name: str, device: str) -> Segmenter:
    torch.manual_seed(0)
    kind = "prototype" if name == "prototype" else "softmax_projected"
    model = build(Model(network="timm", backbone="resnet50", decoder="fpn"), Head(kind=kind), CLASSES)
    if name == "softmax, strips":
        head = StripSoftmaxHead(model.head.in_channels, CLASSES, projection="mlp", embed_dim=model.head.embed_dim)
        head.load_state_dict(model.head.state_dict())
        model.head = head
    if name == "release":
        model.head = ReleaseHead(model.head.projection, model.head.embed_dim)
    return model.to(device).to(memory_format=torch.channels_last).train()


def batch(count: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """(B, 3, size, size) uint8 images and (B, size, size) labels: tiles of about 20 classes, 5 % void."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), generator=g, dtype=torch.uint8)
    present = torch.randperm(CLASSES, generator=g)[:20]
    tiles = present[torch.randint(20, (count, 1, 8, 8), generator=g)]
    labels = F.interpolate(tiles.double(), size=(size, size)).long()[:, 0]
    labels = torch.where(torch.rand(labels.shape, generator=g) < 0.05, VOID, labels)
    return images.to(device), labels.to(device)


class Step:
    """One training step of a contestant, whole or by parts."""

    def __init__(self, name: str, arguments: argparse.Namespace):
        self.device: str = arguments.device
        self.amp: bool = arguments.amp
        self.model = network(name, arguments.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.images, self.labels = batch(arguments.batch, arguments.size, arguments.device)

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.amp)

    def __call__(self, mark: Callable[[], None] = lambda: None) -> None:
        """`mark` is called after each of `PARTS`."""
        self.optimizer.zero_grad()
        with self.autocast():
            features = self.model.features(self.images)
            mark()
            losses = self.model.head.losses(features, self.labels)
        mark()
        losses.total.backward()
        mark()
        self.model.update(losses)
        mark()
        self.optimizer.step()
        mark()

    def parts(self) -> list[float]:
        """Seconds of each part."""
        times = [clock(self.device)]
        self(lambda: times.append(clock(self.device)))
        return [b - a for a, b in itertools.pairwise(times)]


def peak(name: str, arguments: argparse.Namespace) -> float:
    step = Step(name, arguments)
    return second_peak(step, step.optimizer, arguments.device)


def second_peak(step: Callable[[], None], optimizer: torch.optim.Optimizer, device: str) -> float:
    """MB that a second step adds at its peak, in this process. On a CPU the allocator keeps some of the first."""
    step()
    optimizer.zero_grad()
    if device != "cpu":
        return peak_of(step, device)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step()
    return (resident("VmHWM") - before) / 1024


def own_process(name: str, arguments: argparse.Namespace) -> float:
    if arguments.device != "cpu":  # its allocator counts
        return peak(name, arguments)
    command = [sys.executable, "-m", "benchmarks.step", "--peak-of", name, "--device", arguments.device]
    command += ["--batch", str(arguments.batch), "--size", str(arguments.size)] + ["--amp"] * arguments.amp
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return float(done.stdout)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    steps = {name: Step(name, arguments) for name in CONTESTANTS}
    seconds = timed({name: partial(step) for name, step in steps.items()}, arguments.rounds, arguments.device)
    rounds = [{name: step.parts() for name, step in steps.items()} for _ in range(arguments.rounds)]
    found: dict[str, Any] = {
        "ms": {name: 1e3 * statistics.median(v) for name, v in seconds.items()},
        "parts, ms": {
            name: {part: 1e3 * statistics.median(r[name][i] for r in rounds) for i, part in enumerate(PARTS)}
            for name in CONTESTANTS
        },
        "prototype / softmax": ratio(seconds["prototype"], seconds["softmax"]),
        "prototype / softmax, strips": ratio(seconds["prototype"], seconds["softmax, strips"]),
        "release / prototype": ratio(seconds["release"], seconds["prototype"]),
    }
    if arguments.memory:
        found["peak MB"] = {name: own_process(name, arguments) for name in CONTESTANTS}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", default="")
    parser.add_argument("--peak-of", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        print(peak(arguments.peak_of, arguments))
        return
    found = measure(arguments)
    print(json.dumps(found, indent=1))
    settings = {key: getattr(arguments, key) for key in ("batch", "size", "amp", "rounds")}
    record(arguments.json, machine(arguments.device), settings=settings, results=found)


if __name__ == "__main__":
    main()
