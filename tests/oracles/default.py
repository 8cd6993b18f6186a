"""The sound way, in float64 with one loop per class and per prototype: what `preset="default"` must compute.

Written from the specification of the method alone, never from `src/`. Dense everywhere: the table of every pixel with
every prototype exists, sums are Python loops, gradients come from autograd through that table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from oracles.reference import cross_entropy, project, resize_nearest, unit, upsample


def plan_of_one_class(cosine: Tensor, kappa: float, iterations: int) -> Tensor:
    """(n, K) cosines of the pixels of ONE class -> (n, K) log of the plan, every row a distribution. Log domain.

    Rows of prototypes first (each holds 1/K of the mass), pixels last, so that pixels are exact.
    """
    k = cosine.shape[1]
    score = cosine.double() / kappa
    log_v = torch.zeros(len(score), dtype=torch.float64)
    log_plan = score
    for _ in range(iterations):
        log_u = torch.stack([-np.log(k) - torch.logsumexp(score[:, j] + log_v, 0) for j in range(k)])
        log_v = torch.stack([-torch.logsumexp(score[i] + log_u, 0) for i in range(len(score))])
        log_plan = score + log_u[None, :] + log_v[:, None]
    return log_plan


def sinkhorn(own: Tensor, classes: Tensor, num_classes: int, kappa: float, iterations: int) -> Tensor:
    """(N, K) cosines of each pixel with the prototypes of its class -> (N, K) log plan; void rows are NaN."""
    out = torch.full_like(own.double(), float("nan"))
    for c in range(num_classes):
        mine = classes == c
        if mine.any():
            out[mine] = plan_of_one_class(own[mine], kappa, iterations)
    return out


@dataclass
class Step:
    scores: Tensor  # (B, C, h, w)
    ce: Tensor
    ppc: Tensor
    ppd: Tensor
    total: Tensor
    gradient: Tensor  # of the total with respect to the features
    assignment: Tensor  # (B, h, w)
    log_plan: Tensor  # (N, K)
    embedding: Tensor  # (N, D) unit
    errors: Tensor  # (N, C) what the classes get wrong, in units of a pixel


def step(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    scale: float,
    tau: float,
    contrast_weight: float,
    distance_weight: float,
    projection: list[tuple[Tensor, Tensor]] | None = None,
    kappa: float = 0.05,
    iterations: int = 3,
    siblings: bool = True,
    class_weights: Tensor | None = None,
    align_corners: bool = False,
    exact: bool = True,
    nearest: bool = False,
) -> Step:
    """Scores, losses, gradient and assignment; labels (B, H, W) int64, -1 where void.

    Args:
        scale: g, what a cosine is multiplied with to become a logit.
        siblings: whether the other prototypes of the own class are negatives of the contrast.
        exact: labels come to the size of the features by nearest-exact.
        nearest: assign to the nearest own prototype instead of by the balanced plan.
    """
    batch, _, height, width = features.shape
    classes, k, d = prototypes.shape
    features = features.detach().double().clone().requires_grad_(True)
    p = prototypes.detach().double()
    z = project(features, projection or [])
    x = unit(z, dim=1).permute(0, 2, 3, 1).reshape(-1, d)
    table = x @ p.reshape(classes * k, d).T  # N C*K
    best = table.reshape(-1, classes, k).amax(2)
    scores = (scale * best).reshape(batch, height, width, classes).permute(0, 3, 1, 2)

    y = resize_nearest(labels, (height, width), exact).reshape(-1)
    assignment = torch.full_like(y, -1)
    log_plan = torch.full((len(y), k), float("nan"), dtype=torch.float64)
    with torch.no_grad():
        for c in range(classes):
            mine = y == c
            if mine.any():
                own = table[mine, c * k : (c + 1) * k]
                log_plan[mine] = plan_of_one_class(own, kappa, iterations)
                assignment[mine] = c * k + (own if nearest else log_plan[mine]).argmax(1)

    rows = torch.nonzero(y >= 0)[:, 0]
    count = max(len(rows), 1)
    contrast = distance = table.sum() * 0
    for i in rows.tolist():
        own_cosine = table[i, assignment[i]]
        negatives = [j for j in range(classes * k) if siblings or j // k != y[i] or j == assignment[i]]
        contrast = contrast + torch.logsumexp(table[i, negatives] / tau, 0) - own_cosine / tau
        distance = distance + (1 - own_cosine) ** 2
    ppc, ppd = contrast / count, distance / count
    fine = upsample(scores, labels.shape[1:], align_corners)
    ce = cross_entropy(fine.permute(0, 2, 3, 1).reshape(-1, classes), labels.reshape(-1), class_weights)
    total = ce + contrast_weight * ppc + distance_weight * ppd
    (slope,) = torch.autograd.grad(ce, scores, retain_graph=True)
    weights = torch.ones(classes, dtype=torch.float64) if class_weights is None else class_weights.double()
    mass = weights[labels[labels >= 0]].sum()
    errors = -slope * mass * (height * width) / (labels.shape[1] * labels.shape[2])
    (gradient,) = torch.autograd.grad(total, features)
    assignment = assignment.reshape(batch, height, width)
    return Step(
        scores.detach(),
        ce.detach(),
        ppc.detach(),
        ppd.detach(),
        total.detach(),
        gradient,
        assignment,
        log_plan,
        x.detach(),
        errors.permute(0, 2, 3, 1).reshape(-1, classes),
    )


def error_sums(x: Tensor, assignment: Tensor, p: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (C, K, D) and counts (C, K) by which prototypes move that learn from errors: one pixel, one class at a time.

    A pixel's error of its own class goes to the prototype it was given, those of the others to their nearest.
    """
    classes, k, d = p.shape
    sums, counts = torch.zeros(classes, k, d, dtype=torch.float64), torch.zeros(classes, k, dtype=torch.float64)
    for i in range(len(x)):
        given = int(assignment[i])
        for c in range(classes):
            if given >= 0 and given // k == c:
                j = given % k
                counts[c, j] += 1
            else:
                cosines = [float(x[i] @ p[c, m]) for m in range(k)]
                j = cosines.index(max(cosines))
            sums[c, j] += errors[i, c] * x[i]
    return sums, counts


class Memory:
    """Prototypes and their momentum, one prototype at a time.

    rule: "constant" (a = 1 - mu), "bias_corrected" (q = 1) or "count_aware" (q = min(n, cap), unnormalised memory).
    weight: what the start counts for; 0 means that the first hit replaces it.
    """

    def __init__(
        self, prototypes: Tensor, rule: str, mu: float, cap: float = float("inf"), weight: float = 0.0
    ) -> None:
        self.p = prototypes.detach().double().clone()
        self.a = self.p.clone()  # the accumulator of the count-aware rule
        self.weight = torch.full(self.p.shape[:2], weight, dtype=torch.float64)
        self.rule, self.mu, self.cap = rule, mu, cap

    def update(self, x: Tensor, assignment: Tensor, keep: Tensor | None = None, errors: Tensor | None = None) -> None:
        """x: (N, D) unit embeddings; assignment: (N,) prototype id or -1; keep: (N,) pixels that may update; errors:
        (N, C) to move by."""
        assignment = assignment.reshape(-1)
        classes, k, _ = self.p.shape
        wrong = None if errors is None else error_sums(x, assignment, self.p, errors)[0]
        for c in range(classes):
            for j in range(k):
                mine = assignment == c * k + j
                if keep is not None:
                    mine = mine & keep
                n = int(mine.sum())
                if n == 0:
                    continue
                first = float(self.weight[c, j]) == 0  # its first pixels replace it, whatever moves it later
                s = x[mine].double().sum(0) if wrong is None or first else wrong[c, j]
                q = min(n, self.cap) if self.rule == "count_aware" else 1.0
                self.weight[c, j] = self.mu * self.weight[c, j] + q
                a = q / float(self.weight[c, j])
                if self.rule == "constant":
                    a = 1.0 if first else 1 - self.mu
                if self.rule == "count_aware":
                    self.a[c, j] = (1 - a) * self.a[c, j] + a * s / n
                    self.p[c, j] = unit(self.a[c, j])
                else:
                    self.p[c, j] = unit((1 - a) * self.p[c, j] + a * unit(s))


@dataclass
class Planted:
    """Clusters whose truth is known. Features are laid out as an image, ready for a head without projection."""

    centres: Tensor  # (C, K, D) unit
    features: Tensor  # (B, D, h, w) float32
    labels: Tensor  # (B, h, w) class
    cluster: Tensor  # (B*h*w,) c*K + k of the centre each pixel was drawn from

    @property
    def cosine(self) -> float:
        """Mean cosine of two different centres of one class."""
        return mean_pairwise_cosine(self.centres)


def planted_centres(classes: int, k: int, d: int, cosine: float, generator: torch.Generator) -> Tensor:
    """(C, K, D): within a class every two centres have about this cosine, a common direction plus individual ones."""
    centres = torch.empty(classes, k, d, dtype=torch.float64)
    for c in range(classes):
        # Orthonormal rows: one common direction, k individual ones; the cosine is then exact.
        basis, _ = torch.linalg.qr(torch.randn(d, k + 1, generator=generator, dtype=torch.float64))
        for j in range(k):
            centres[c, j] = cosine**0.5 * basis[:, 0] + (1 - cosine) ** 0.5 * basis[:, j + 1]
    return centres


def planted_batch(centres: Tensor, size: tuple[int, int, int], noise: float, generator: torch.Generator) -> Planted:
    """Pixels drawn uniformly over classes and clusters: a centre plus noise of this length (not this deviation)."""
    classes, k, d = centres.shape
    n = size[0] * size[1] * size[2]
    cluster = torch.randint(classes * k, (n,), generator=generator)
    x = centres.reshape(-1, d)[cluster]
    x = unit(x + noise * torch.randn(n, d, generator=generator, dtype=torch.float64) / d**0.5)
    features = x.reshape(*size, d).permute(0, 3, 1, 2).float().contiguous()
    return Planted(centres, features, (cluster // k).reshape(size), cluster)


def mean_pairwise_cosine(prototypes: Tensor) -> float:
    """Mean cosine over pairs of different prototypes of one class, over all classes."""
    p = unit(prototypes.double())
    k = p.shape[1]
    values = [float(p[c, i] @ p[c, j]) for c in range(len(p)) for i in range(k) for j in range(i)]
    return sum(values) / len(values)


def purity(assignment: Tensor, cluster: Tensor, total: int) -> float:
    """Share of pixels whose prototype's majority cluster is their own cluster; void (-1) left out."""
    assignment, cluster = assignment.reshape(-1), cluster.reshape(-1)
    labelled = assignment >= 0
    table = torch.zeros(total, total, dtype=torch.int64)
    for a, b in zip(assignment[labelled].tolist(), cluster[labelled].tolist(), strict=True):
        table[a, b] += 1
    return float(table.amax(1).sum()) / float(table.sum())
