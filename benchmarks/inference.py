"""Answers instead of training: a 1x1 convolution beside the prototype head, plain, frozen, in bfloat16 and int8.

    python -m benchmarks.inference [--shape C150 ...] [--rounds 5] [--memory] [--device cuda [--tf32]] [--json out.json]
    python -m benchmarks.inference --model RUN --images 'camvid/test/*.png'     # a trained model on real images
    python -m benchmarks.inference --huge 4000 6000                             # peak memory of one large image

One image of 512 x 512 at stride 4 (16,384 pixels), features channels last; one thread, process CPU time, contestants
interleaved in one process, medians, a ratio is the median of the rounds' ratios. `conv` is `nn.Conv2d` as it comes,
`conv, same product` the same 1x1 layer through the library that the prototypes' product takes: the floor of a linear
head. Shapes ending in `-mlp` start at 256 channels and hold the projection; their `conv` is the plain softmax head on
those 256 channels, `conv projected` the one behind the same projection. `... to pixels` are labels at 512 x 512.
`release` is the 2022 head as it answers, behind the projection where there is one: two norms, a table of all cosines,
the maximum over K and the norm of the scores; to pixels with its resize and an arg-max.
`unscreened` is the frozen head without 16 bit codes; "left open" the share of pixels whose scores were made in full
precision after the codes had not told.
Prototypes lie on the means of planted clusters and features near them: easier than real features, so what the rounded
precisions keep is to be taken from `--model`.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import glob
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import head as training
from benchmarks.head import K, machine, peak_of, ratio, record, resident, same_precision, timed
from oracles.reference_loop import ReferenceHead
from protoseg import kernels
from protoseg.config import Evaluation, Head, Model, UserError
from protoseg.data.images import read_image
from protoseg.engine.windows import segment_labels
from protoseg.kernels import inference as kernel
from protoseg.kernels.inference import Precision
from protoseg.method.head import Projection, PrototypeHead
from protoseg.method.inference import FrozenHead, bilinear_labels, freeze
from protoseg.models import build, saving
from protoseg.models.softmax_head import SoftmaxHead

SIDE, UP, WIDE = 128, 4, 256
ROUNDED: tuple[Precision, ...] = ("bf16", "int8")


@dataclass(frozen=True)
class Shape:
    classes: int
    dim: int
    projected: bool = False


SHAPES = {
    "C2": Shape(2, 256),
    "C2-D64": Shape(2, 64),
    "C19": Shape(19, 256),
    "C19-D64": Shape(19, 64),
    "C150": Shape(150, 256),
    "C150-D64": Shape(150, 64),
    "C847": Shape(847, 256),
    "C19-mlp": Shape(19, 256, projected=True),
    "C150-mlp": Shape(150, 256, projected=True),
    "C150-D64-mlp": Shape(150, 64, projected=True),
}


def trained(shape: Shape, device: str) -> tuple[PrototypeHead, Tensor]:
    """A head whose prototypes hold the planted clusters, and (1, D', h, w) features near them."""
    wide = WIDE if shape.projected else shape.dim
    features, labels, centres = training.batch(training.Shape(shape.classes, wide, images=1), SIDE, device)
    torch.manual_seed(0)
    kind: Projection = "mlp" if shape.projected else "none"
    void = training.VOID
    head = PrototypeHead(
        wide, shape.classes, projection=kind, embed_dim=shape.dim, preset="paper", momentum=0.0, ignore_index=void
    ).to(device)
    if not shape.projected:
        head.prototypes.copy_(centres)
    else:
        for _ in range(2):  # momentum 0: prototypes go to the means of their pixels
            head.update(head.losses(features, labels))
    return head.eval(), features.contiguous(memory_format=torch.channels_last)


def unscreened(form: FrozenHead) -> FrozenHead:
    twin = copy.deepcopy(form)
    twin.screen = None
    return twin


def left_open(form: FrozenHead, batches: list[Tensor], size: tuple[int, int] | None = None) -> float:
    """Share of the feature pixels whose scores `labels` makes in full precision because the codes do not tell."""
    made, true_rows = [], form._true_rows

    def counted(features: Tensor, index: Tensor, *rest: object) -> Tensor:
        made.append(len(index))
        return true_rows(features, index, *rest)

    form._true_rows = counted  # type: ignore[method-assign]
    try:
        for features in batches:
            form.labels(features, size)
    finally:
        del form._true_rows  # the instance's; the class keeps its own
    return sum(made) / sum(features[:, 0].numel() for features in batches)


def contestants(
    shape: Shape, device: str, rounded: Sequence[Precision] = ROUNDED
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, float], dict[str, float]]:
    """name -> one answer; name -> share of labels kept; name -> share of pixels left open."""
    head, features = trained(shape, device)
    conv = nn.Conv2d(features.shape[1], shape.classes, 1).to(device)
    rows = features.permute(0, 2, 3, 1).flatten(0, 2)
    weight, bias = conv.weight.detach()[:, :, 0, 0], conv.bias
    size = (SIDE * UP, SIDE * UP)
    frozen = {"frozen": freeze(head, calibration=features, agreement=0.0)}
    for precision in rounded:
        try:
            frozen[precision] = freeze(head, precision=precision, calibration=features, agreement=0.0)
        except (ValueError, RuntimeError) as reason:  # this machine has no such product, or not of these sizes
            print(f"  {precision}: {reason}")

    def pixels(scores: Callable[[Tensor], Tensor], align_corners: bool = False) -> Tensor:
        return F.interpolate(scores(features), size=size, mode="bilinear", align_corners=align_corners).argmax(1)

    loop = ReferenceHead(shape.dim, shape.classes, K).to(device)
    loop.prototypes.data.copy_(head.prototypes)

    def release(features: Tensor) -> Tensor:
        return loop.similarity(head.projection(features))[2]

    def plain() -> Tensor:
        with kernels.plain_only():
            return head(features)

    steps: dict[str, Callable[[], Tensor]] = {
        "conv": lambda: conv(features),
        "conv, same product": lambda: kernel.linear(rows, weight, bias),
        "release": lambda: release(features),
        "plain": plain,
        "head": lambda: head(features),
    }
    if shape.projected:
        width = features.shape[1]
        twin = SoftmaxHead(width, shape.classes, projection="mlp", embed_dim=shape.dim, ignore_index=training.VOID).to(
            device
        )
        steps["conv projected"] = lambda: twin(features)
    for name, form in frozen.items():
        steps[name] = partial(form, features)
        steps[f"{name} labels"] = partial(form.labels, features)
    frozen["unscreened"] = unscreened(frozen["frozen"])
    steps["unscreened labels"] = partial(frozen["unscreened"].labels, features)
    steps["conv to pixels"] = partial(pixels, conv)
    steps["conv to pixels, our arg-max"] = lambda: bilinear_labels(conv(features), size)
    steps["release to pixels"] = partial(pixels, release, align_corners=True)
    steps["head to pixels"] = partial(pixels, head)
    for name, form in frozen.items():
        steps[f"{name} to pixels"] = partial(form.labels, features, size)
    expected = pixels(head)
    kept = {f"{name} to pixels": share(steps[f"{name} to pixels"](), expected) for name in frozen}
    form, sizes = frozen["frozen"], {"frozen labels": None, "frozen to pixels": size}
    open_ = {name: left_open(form, [features], up) for name, up in sizes.items() if form.screen is not None}
    return steps, kept, open_


def share(labels: Tensor, expected: Tensor) -> float:
    return float((labels == expected).double().mean())


def peak(shape: Shape, name: str, device: str) -> float:
    """MB that one answer adds at its peak in this process, on a heap that keeps nothing of what went before."""
    steps, _, _ = contestants(shape, device, ())
    step = steps[name]
    step()
    if device != "cpu":
        return peak_of(step, device)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step()
    return (resident("VmHWM") - before) / 1024


def measure(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    shape = SHAPES[name]
    steps, kept, open_ = contestants(shape, arguments.device, arguments.rounded)
    seconds = timed(steps, arguments.rounds, arguments.device)
    found: dict[str, object] = {
        "ms": {k: 1e3 * statistics.median(v) for k, v in seconds.items()},
        "over conv": {
            k: ratio(v, seconds["conv to pixels" if "to pixels" in k else "conv"]) for k, v in seconds.items()
        },
        "over conv, same product": {
            k: ratio(v, seconds["conv, same product"]) for k, v in seconds.items() if "to pixels" not in k
        },
        "labels kept": kept,
        "left open": open_,
    }
    if arguments.memory:
        names = [name + to for to in ("", " to pixels") for name in ("conv", "release", "head", "frozen")]
        found["peak MB"] = {contestant: own_process(name, contestant, arguments.device) for contestant in names}
    return found


def own_process(name: str, contestant: str, device: str) -> float:
    if device != "cpu":  # its allocator counts; a process would cost seconds
        return peak(SHAPES[name], contestant, device)
    command = [sys.executable, "-m", "benchmarks.inference", "--shape", name, "--peak-of", contestant]
    done = subprocess.run(
        [*command, "--device", device], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    return float(done.stdout)


def show(name: str, found: dict) -> None:
    shape = SHAPES[name]
    print(f"{name}: C={shape.classes} D={shape.dim}{' behind its projection' if shape.projected else ''}")
    for title in ("ms", "over conv", "over conv, same product", "labels kept", "left open", "peak MB"):
        if found.get(title):
            digits = {"ms": 1, "peak MB": 0, "labels kept": 5, "left open": 5}.get(title, 2)
            print(f"  {title}: " + ", ".join(f"{k} {v:.{digits}f}" for k, v in found[title].items()))
    sys.stdout.flush()


def on_real_images(folder: str, pattern: str, rounds: int, device: str) -> dict[str, object]:
    """Labels kept and time of the head alone, from features to labels, on up to 8 real images of one size.

    Raises:
        UserError: no image, images of several sizes, or a head without prototypes.
    """
    model, _ = saving.load(Path(folder))
    model = model.eval().to(device)
    if not hasattr(model.head, "prototypes"):
        raise UserError(f"{folder}: its head has no prototypes; give a run of head.kind=prototype")
    paths = sorted(glob.glob(pattern))
    paths = paths[:: max(1, len(paths) // 8)][:8]
    if not paths:
        raise UserError(f"no image matches {pattern}; quote the pattern, and look at the folder")
    images = [torch.from_numpy(read_image(Path(path), False)).permute(2, 0, 1) for path in paths]
    if len({image.shape for image in images}) > 1:
        raise UserError(f"{pattern}: images of several sizes; give images of one size")
    with torch.no_grad():
        batches = [model.features(image[None].to(device)) for image in images]
        size = tuple(model._prepare(images[0][None].to(device)).shape[-2:])
        expected = torch.cat(
            [
                F.interpolate(model.head(f), size, mode="bilinear", align_corners=model.head.align_corners).argmax(1)
                for f in batches
            ]
        )
    forms = {}
    for name, named in {
        "frozen": {}, "pruned": {"prune": True}, "bf16": {"precision": "bf16"}, "int8": {"precision": "int8"},
        "int8, pruned": {"prune": True, "precision": "int8"},
    }.items():  # fmt: skip
        try:
            forms[name] = freeze(model.head, calibration=batches, agreement=0.0, **named)
        except ValueError as reason:  # this machine has no such product
            print(f"  {name}: {reason}")
    forms["unscreened"] = unscreened(forms["frozen"])
    one, head = batches[0], model.head
    conv = nn.Conv2d(one.shape[1], head.num_classes, 1).to(device)

    def resized(scores: Callable[[Tensor], Tensor]) -> Tensor:
        return F.interpolate(scores(one), size, mode="bilinear", align_corners=head.align_corners).argmax(1)

    steps: dict[str, Callable[[], object]] = {"conv": partial(resized, conv), "head": partial(resized, head)}
    steps |= {name: partial(form.labels, one, size) for name, form in forms.items()}
    steps["network"] = lambda: model.features(images[0][None].to(device))
    with torch.no_grad():
        seconds = timed(steps, rounds, device)
    return {
        "images": len(paths),
        "size": size,
        "form": {name: repr(form).splitlines()[1].strip() for name, form in forms.items()},
        "ms": {name: 1e3 * statistics.median(v) for name, v in seconds.items()},
        "left open": {
            name: [left_open(forms[name], batches), left_open(forms[name], batches, size)]
            for name in ("frozen", "pruned")
            if forms[name].screen is not None
        },
        "labels kept at feature size": {name: form.agreement for name, form in forms.items()},
        "labels kept": {
            name: share(torch.cat([form.labels(f, size) for f in batches]), expected) for name, form in forms.items()
        },
    }


def huge(height: int, width: int) -> dict[str, float]:
    """GiB resident at the peak, 171 classes in windows of 512, in this process, and before the image was there."""
    model = build(Model(), Head(), 171).eval()
    model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    before = resident("VmRSS") / 2**20
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    labels, _ = segment_labels(model, image, Evaluation(mode="slide"), dtype=torch.uint8)
    assert labels.shape == (height, width)
    return {"before": before, "peak": resident("VmHWM") / 2**20}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounded", nargs="*", choices=ROUNDED, default=ROUNDED, help="slow on a CPU without VNNI")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tf32", action="store_true", help="on a GPU, convolutions and products both")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", default="")
    parser.add_argument("--model", default="", help="a saved model folder")
    parser.add_argument("--images", default="", help="a quoted pattern of images of one size")
    parser.add_argument("--huge", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--peak-of", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    same_precision(arguments.device, arguments.tf32)
    if arguments.peak_of:
        print(peak(SHAPES[arguments.shape[0]], arguments.peak_of, arguments.device))
        return
    results: dict[str, object] = {}
    if arguments.huge:
        results["huge"] = huge(*arguments.huge)
        print(json.dumps(results))
    elif arguments.model:
        results["real"] = on_real_images(arguments.model, arguments.images, arguments.rounds, arguments.device)
        print(json.dumps(results, indent=1))
    else:
        for name in arguments.shape:
            found = measure(name, arguments)
            show(name, found)
            results[name] = found
    record(arguments.json, machine(arguments.device), results=results)


if __name__ == "__main__":
    main()
