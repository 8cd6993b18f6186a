"""What each difference between `default` and the 2022 code does, measured alone.

    python -m benchmarks.fidelity [--steps 3000]

Takes about two minutes on one core. Planted clusters as in `benchmarks.planted`.
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.planted import CLASSES, COSINE, NOISE, REPORT, D, K, curve
from oracles.default import planted_batch, planted_centres
from protoseg.method import clustering
from protoseg.method.head import PrototypeHead
from protoseg.method.similarity import cosine_similarity, embed, own_similarity, unit

NORMS = ("width", "channel")


def row(name: str, reference: str, default: str) -> None:
    print(f"| {name} | {reference} | {default} |", flush=True)


def draw_agreement() -> tuple[float, float]:
    """Share of pixels whose drawn prototype is the plan's argmax, with perfect prototypes: the draw, then argmax."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    centres = planted_centres(CLASSES, K, D, COSINE, generator).float()
    batch = planted_batch(centres.double(), (2, 25, 40), NOISE, generator)
    x = unit(embed(batch.features))
    classes = batch.labels.flatten()
    plan = clustering.sinkhorn(own_similarity(cosine_similarity(x, centres), classes, CLASSES), classes, CLASSES)
    drawn = clustering.drawn_assignment(plan)
    return float((drawn == plan.argmax(1)).float().mean()), 1.0


def crop_dependence(norm: str) -> float:
    """Cosine between a pixel's embedding in the whole picture and in its left half, mean over the left half."""
    torch.manual_seed(0)
    steps = torch.randn(1, 64, 16, 128).cumsum(3)  # features that drift along the picture, as real ones do
    whole, half = (unit(embed(f, norm)) for f in (steps, steps[..., :64]))  # type: ignore[arg-type]
    whole = whole.view(16, 128, -1)[:, :64].flatten(0, 1)
    return float((whole * half).sum(1).mean())


def contrast_floor(temperature: float, classes: int) -> float:
    """Share of PPC's value at chance that is left when every pixel sits on its prototype and all others at a right
    angle: what no training can remove, a constant pull."""
    others = classes * K - 1
    floor = math.log(1 + others * math.exp(-1 / temperature))
    return floor / math.log(classes * K)


def radial_gradient(preset: str, classes: int) -> float:
    """Gradient of the cross-entropy along "all cosines of this pixel larger", relative to the whole gradient."""
    torch.manual_seed(0)
    head = PrototypeHead(D, classes, num_prototypes=1, projection="none", preset=preset)
    similarity = (0.3 * torch.randn(512, classes)).requires_grad_()
    target = torch.randint(classes, (512,))
    F.cross_entropy(head.score(similarity), target).backward()
    gradient: Tensor = similarity.grad  # type: ignore[assignment]
    along = (gradient * unit(similarity.detach())).sum(1).abs().mean()
    return float(along / gradient.norm(dim=1).mean())


def old_logits_change(preset: str) -> float:
    """Largest change of the first 18 logits when a nineteenth class joins, relative to their spread."""
    torch.manual_seed(0)
    scores = torch.randn(256, 19)
    eighteen = PrototypeHead(D, 18, num_prototypes=1, projection="none", preset=preset)
    nineteen = PrototypeHead(D, 19, num_prototypes=1, projection="none", preset=preset)
    with torch.no_grad():
        before, after = eighteen.score(scores[:, :18]), nineteen.score(scores)[:, :18]
    return float((before - after).abs().max() / before.std())


def split_dependence() -> float:
    """Largest change of a prototype by one step when the batch is clustered whole or as two halves that average."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    centres = planted_centres(CLASSES, K, D, COSINE, generator)
    batch = planted_batch(centres, (2, 25, 40), NOISE, generator)
    named = {"projection": "none", "preset": "paper", "start": "data"}
    memories = []
    for parts in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        heads = []
        for part in parts:
            torch.manual_seed(0)
            head = PrototypeHead(D, CLASSES, num_prototypes=K, **named)  # type: ignore[arg-type]
            head.update(head.losses(batch.features[part], batch.labels[part]))
            heads.append(head.prototypes)
        memories.append(unit(torch.stack(heads).mean(0)))
    return float((memories[0] - memories[1]).norm(dim=-1).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, choices=REPORT)
    steps = parser.parse_args().steps
    print("| what | reference | default |\n|---|---|---|")
    row("pixels that move the prototype their losses aim at", *(f"{share:.3f}" for share in draw_agreement()))
    names = ("reference", "reference_fixed", "paper", "default")
    found = {name: "{:.3f} / {:.3f}".format(*curve({"preset": name}, steps, 0)[steps]) for name in names}
    row(
        f"planted clusters, {steps} steps: purity / pairwise cosine (truth 1 / {COSINE})",
        f"{found['reference']} (reference_fixed: {found['reference_fixed']})",
        f"{found['default']} (paper: {found['paper']})",
    )
    row("one pixel in the whole picture and in its left half: cosine", *(f"{crop_dependence(n):.3f}" for n in NORMS))
    for classes in (19, 150):
        parts = (f"{contrast_floor(tau, classes):.3f} (tau {tau})" for tau in (1.0, 0.1))
        row(f"part of PPC no training removes, C = {classes}", *parts)
    pair = ("reference", "default")
    row("cross-entropy's gradient towards larger cosines, share", *(f"{radial_gradient(p, 19):.4f}" for p in pair))
    row("change of 18 logits when a class joins, in their spread", *(f"{old_logits_change(p):.3f}" for p in pair))
    row("a prototype's change when two ranks share the batch", f"{split_dependence():.3f}", "0 (a test)")


if __name__ == "__main__":
    main()
