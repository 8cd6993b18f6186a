"""Eq. (3), (4): which prototype of its class a pixel belongs to. Entropic optimal transport with equal shares, all
classes in one segmented pass: no loop over classes, no host sync, and the same numbers on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from protoseg import kernels
from protoseg.method import ranks

Reduction = Callable[[Tensor], Tensor]


def alone(values: Tensor) -> Tensor:
    """The reduction of a rank that clusters its own pixels only, as the 2022 code does."""
    return values


def class_counts(classes: Tensor, num_classes: int) -> Tensor:
    """(C,) int64 number of pixels of each class; `classes` is (N,) with -1 for none."""
    counts = classes.new_zeros(num_classes + 1)
    return counts.index_add_(0, _segments(classes, num_classes), torch.ones_like(classes))[:num_classes]


def sinkhorn(
    own: Tensor,
    classes: Tensor,
    num_classes: int,
    *,
    kappa: float = 0.05,
    iterations: int = 3,
    log_shares: Tensor | None = None,
    total: Reduction = ranks.total,
    largest: Reduction = ranks.largest,
) -> Tensor:
    """Eq. (4): the transport plan between the pixels of each class and its K prototypes, in the log domain.

    A round gives every prototype its share of the class's pixels, then every pixel exactly one unit; the pixels come
    last, so their sums are exact after any number of rounds while the shares are met only at convergence. Classes do
    not see each other. Shifting by a constant per class only keeps the rounds equal to the plain `exp` form.

    Args:
        own: (N, K) cosine of each pixel with the prototypes of its own class, finite everywhere.
        classes: (N,) class of a pixel, -1 where it has none.
        kappa: weight of the entropy (paper: 0.05); smaller is closer to a hard assignment.
        iterations: rounds (paper: 3).
        log_shares: (C, K) log of the share of its class each prototype gets, -inf switches one off; default 1/K each.
        total, largest: sum and maximum over ranks; `alone` clusters each rank by itself.

    Returns:
        (N, K) log of the plan; `exp` of a labelled pixel's row sums to 1. Rows of pixels without a class mean nothing.
    """
    K = own.shape[1]
    segments = _segments(classes, num_classes)  # N, pixels without a class in segment C
    index = segments[:, None].expand(-1, K)
    if log_shares is None:
        log_shares = own.new_full((num_classes, K), -math.log(K))
    log_shares = torch.cat([log_shares.to(own.dtype), own.new_zeros(1, K)])  # C+1 K
    if kernels.log_plan_applies(own):
        return kernels.log_plan(own, classes, num_classes, log_shares, kappa, iterations, total, largest)
    kernel = own / kappa
    log_v = own.new_zeros(own.shape[0], 1)
    plan = kernel
    for _ in range(iterations):
        mass = kernel + log_v
        peak = own.new_full((num_classes + 1, K), -math.inf).scatter_reduce_(0, index, mass, "amax")
        peak = largest(peak)
        peak = torch.where(peak.isfinite(), peak, 0)
        sums = own.new_zeros(num_classes + 1, K).index_add_(0, segments, (mass - peak[segments]).exp())
        sums = total(sums)
        log_u = torch.where(sums > 0, log_shares - peak - sums.clamp(min=1e-38).log(), 0)  # an absent class: no change
        plan = kernel + log_u[segments]
        log_v = -plan.logsumexp(1, keepdim=True)
    return plan + log_v


def hard_assignment(
    log_plan: Tensor,
    own: Tensor,
    classes: Tensor,
    num_classes: int,
    *,
    small_classes: Literal["nearest", "plan"] = "nearest",
    total: Reduction = ranks.total,
) -> Tensor:
    """Eq. (4): k_i, the prototype of largest mass in the pixel's row of the plan (or of its log).

    A class with fewer pixels than prototypes cannot be shared out (one pixel: the plan is uniform and its argmax mere
    rounding), so its pixels take their `nearest` prototype; `plan` takes the argmax all the same, and the first
    prototype for a lone pixel, which is how the 2022 code breaks that exact tie.

    Args:
        log_plan: (N, K) from `sinkhorn`. own, classes: what it was made of.

    Returns:
        (N,) index in [0, K) within the pixel's own class; void pixels hold a value that means nothing.
    """
    counts = total(class_counts(classes, num_classes))[classes.clamp(min=0)]  # N
    if small_classes == "plan":
        return torch.where(counts == 1, 0, log_plan.argmax(1))
    return torch.where(counts >= own.shape[1], log_plan.argmax(1), own.argmax(1))


def balanced_assignment(
    own: Tensor,
    classes: Tensor,
    num_classes: int,
    *,
    kappa: float = 0.05,
    iterations: int = 3,
    small_classes: Literal["nearest", "plan"] = "nearest",
    total: Reduction = ranks.total,
    largest: Reduction = ranks.largest,
) -> Tensor:
    """Eq. (3), (4): `sinkhorn`, then `hard_assignment`. (N,) in [0, K)."""
    if kernels.transport_plan_applies(own.dtype, kappa):
        few, lone = (own.shape[1], False) if small_classes == "nearest" else (0, True)
        by_itself = total is alone or (total is ranks.total and ranks.world_size() == 1)
        return kernels.balanced_index(own, classes, num_classes, kappa, iterations, few, lone, total, by_itself)
    plan = sinkhorn(own, classes, num_classes, kappa=kappa, iterations=iterations, total=total, largest=largest)
    return hard_assignment(plan, own, classes, num_classes, small_classes=small_classes, total=total)


def nearest_assignment(
    own: Tensor,
    classes: Tensor,
    num_classes: int,
    *,
    kappa: float = 0.05,
    iterations: int = 3,
    small_classes: Literal["nearest", "plan"] = "nearest",
    total: Reduction = ranks.total,
    largest: Reduction = ranks.largest,
) -> Tensor:
    """Each pixel takes its nearest prototype: online k-means, nothing keeps the shares apart. (N,) in [0, K)."""
    return own.argmax(1)


def drawn_assignment(log_plan: Tensor, gumbel: Tensor | None = None) -> Tensor:
    """The 2022 code's draw: argmax of plan + Gumbel noise, the plan taken as probability where its log was due.

    A pixel wholly assigned to one of ten prototypes is kept there with probability e / (e + 9) = 0.23 only: this is
    why the released prototypes collapse.

    Args:
        log_plan: (N, K) log of the plan.
        gumbel: (N, K) noise -log(Exponential(1)); drawn here if not given.

    Returns:
        (N,) index in [0, K).
    """
    if gumbel is None:
        gumbel = -torch.empty_like(log_plan).exponential_().log()
    return (log_plan.exp() + gumbel).argmax(1)


def _segments(classes: Tensor, num_classes: int) -> Tensor:
    return torch.where(classes < 0, num_classes, classes)
