"""The 2022 release, step by step, in float64 with one loop per class: what `preset="reference"` must reproduce.

Written from a description of the released arithmetic alone, never from `src/`. Slow on purpose: a class is a Python
loop, a row of pixels is a Python loop where that is clearer, and no two quantities share an intermediate. Autograd is
used for one thing only, the gradient of the total loss with respect to the features.

Rows of pixels are always in the order (image, row, column). Ids of prototypes are c*K + k. Void pixels are -1.
One departure is deliberate: the release is NaN on a batch without a labelled pixel, here a mean over nothing is 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

KAPPA = 0.05
ITERATIONS = 3
MOMENTUM = 0.999
CONTRAST_WEIGHT = 0.01
DISTANCE_WEIGHT = 0.001


@dataclass
class Weights:
    """Everything the head learns. `projection` holds (weight (out, in), bias) of its 1x1 convolutions, ReLU between."""

    projection: list[tuple[Tensor, Tensor]]
    feature_norm: tuple[Tensor, Tensor]  # (D,), (D,)
    score_norm: tuple[Tensor, Tensor]  # (C,), (C,)


@dataclass
class Step:
    scores: Tensor  # (B, C, h, w)
    ce: Tensor
    ppc: Tensor
    ppd: Tensor
    total: Tensor
    gradient: Tensor  # (B, in, h, w), of the total
    index: Tensor  # (N,) prototype id of the arg-max of the plan, -1 for void: the target of contrast and distance
    draw: Tensor  # (N,) prototype id drawn with the noise, -1 for void: what the update uses
    kept: Tensor  # (N,) bool, pixels that update
    prototypes: Tensor  # (C, K, D) after the update on this rank alone


def unit(x: Tensor, dim: int = -1, eps: float = 1e-12) -> Tensor:
    length = x.square().sum(dim, keepdim=True).sqrt()
    return x / length.clamp_min(eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weight + bias


def project(features: Tensor, projection: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(B, in, h, w) -> (B, D, h, w): 1x1 convolutions with ReLU between them."""
    x = features
    for n, (weight, bias) in enumerate(projection):
        if n:
            x = x.clamp_min(0)
        x = torch.einsum("oi,bihw->bohw", weight, x) + bias[None, :, None, None]
    return x


def resize_nearest(labels: Tensor, size: tuple[int, int], exact: bool = False) -> Tensor:
    """(B, H, W) -> (B, h, w). Cell i reads floor(i*H/h); with `exact`, the cell's centre: floor((i+1/2)*H/h)."""

    def source(i: int, big: int, small: int) -> int:
        return ((2 * i + 1) * big) // (2 * small) if exact else (i * big) // small

    rows = [source(i, labels.shape[1], size[0]) for i in range(size[0])]
    columns = [source(j, labels.shape[2], size[1]) for j in range(size[1])]
    return torch.stack([torch.stack([labels[:, r, c] for c in columns], 1) for r in rows], 1)


def interpolation_matrix(out: int, size: int, align_corners: bool) -> Tensor:
    """(out, size): the rows are the weights of linear interpolation."""
    matrix = torch.zeros(out, size, dtype=torch.float64)
    for i in range(out):
        if align_corners:
            at = i * (size - 1) / (out - 1) if out > 1 else 0.0
        else:
            at = max((i + 0.5) * size / out - 0.5, 0.0)
        low = min(math.floor(at), size - 1)
        high = min(low + 1, size - 1)
        matrix[i, low] += 1 - (at - low)
        matrix[i, high] += at - low
    return matrix


def upsample(scores: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Bilinear, (B, C, h, w) -> (B, C, H, W)."""
    rows = interpolation_matrix(size[0], scores.shape[2], align_corners)
    columns = interpolation_matrix(size[1], scores.shape[3], align_corners)
    return torch.einsum("Hh,bchw,Ww->bcHW", rows, scores, columns)


def cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None) -> Tensor:
    """(M, C), (M,): weighted mean of -log softmax over the labelled rows; 0 without any."""
    classes = logits.shape[1]
    weights = torch.ones(classes, dtype=torch.float64) if class_weights is None else class_weights.double()
    total, mass = logits.sum() * 0, 0.0
    for c in range(classes):
        rows = logits[labels == c]
        total = total + weights[c] * (torch.logsumexp(rows, 1) - rows[:, c]).sum()
        mass += float(weights[c]) * len(rows)
    return total / mass if mass > 0 else total


def plan_of_one_class(cosine: Tensor, kappa: float = KAPPA, iterations: int = ITERATIONS) -> Tensor:
    """(n, K) cosines of the pixels of ONE class -> (K, n) plan whose columns sum to one."""
    k, n = cosine.shape[1], cosine.shape[0]
    plan = torch.exp(cosine / kappa).T
    plan = plan / plan.sum()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / k
        plan = plan / plan.sum(0, keepdim=True)
        plan = plan / n
    return plan * n


def embed(features: Tensor, weights: Weights, width_norm: bool = True) -> Tensor:
    """Unit embeddings, (N, D). The released norm runs along the image width; `width_norm=False` runs over channels."""
    z = project(features, weights.projection)
    z = unit(z, dim=3 if width_norm else 1)
    rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    return unit(layer_norm(rows, *weights.feature_norm))


def step(
    features: Tensor,
    labels: Tensor,
    weights: Weights,
    prototypes: Tensor,
    noise: Tensor | None,
    class_weights: Tensor | None = None,
    width_norm: bool = True,
    momentum: float = MOMENTUM,
) -> Step:
    """One training step of one rank.

    Args:
        features: (B, in, h, w) float64.
        labels: (B, H, W) int64, -1 where void.
        prototypes: (C, K, D) as left by the step before; unit length is restored here, as at every forward.
        noise: (B*h*w, K) Gumbel noise, one row per pixel whether labelled or not; None: the arg-max is the draw.
    """
    batch, _, height, width = features.shape
    classes, k, d = prototypes.shape
    features = features.detach().clone().requires_grad_(True)
    p = unit(prototypes.double())

    x = embed(features, weights, width_norm)
    cosine = torch.stack([torch.stack([x @ p[c, j] for j in range(k)], 1) for c in range(classes)], 2)  # N K C
    logits = layer_norm(cosine.amax(1), *weights.score_norm)  # N C
    scores = logits.reshape(batch, height, width, classes).permute(0, 3, 1, 2)

    y = resize_nearest(labels, (height, width)).reshape(-1)
    with torch.no_grad():
        index = torch.full_like(y, -1)
        draw = torch.full_like(y, -1)
        kept = (logits.argmax(1) == y) & (y >= 0)
        updated = p.clone()
        for c in range(classes):
            mine = torch.nonzero(y == c)[:, 0]
            if len(mine) == 0:
                continue
            plan = plan_of_one_class(cosine[mine, :, c])  # K n
            best = plan.argmax(0)
            drawn = best if noise is None else (plan.T + noise[mine]).argmax(1)
            index[mine] = c * k + best
            draw[mine] = c * k + drawn
            for j in range(k):
                chosen = mine[(drawn == j) & kept[mine]]
                if len(chosen):
                    mean = unit(x[chosen].sum(0))
                    updated[c, j] = momentum * p[c, j] + (1 - momentum) * mean
        updated = unit(updated)

    labelled = y >= 0
    count = max(int(labelled.sum()), 1)
    every = x[labelled] @ p.reshape(classes * k, d).T
    target = index[labelled]
    own = every[torch.arange(len(target)), target]
    ppc = (torch.logsumexp(every, 1) - own).sum() / count
    ppd = (1 - own).square().sum() / count
    fine = upsample(scores, labels.shape[1:], align_corners=True)
    ce = cross_entropy(fine.permute(0, 2, 3, 1).reshape(-1, classes), labels.reshape(-1), class_weights)
    total = ce + CONTRAST_WEIGHT * ppc + DISTANCE_WEIGHT * ppd
    (gradient,) = torch.autograd.grad(total, features)
    return Step(
        scores.detach(), ce.detach(), ppc.detach(), ppd.detach(), total.detach(), gradient, index, draw, kept, updated
    )


def average_over_ranks(prototypes: list[Tensor]) -> Tensor:
    """The mean of every rank's unit vectors, not unit itself until the next forward makes it so."""
    total = torch.zeros_like(prototypes[0])
    for p in prototypes:
        total = total + p / len(prototypes)
    return total
