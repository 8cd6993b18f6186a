"""Eq. (5) of a band: which prototypes repel a pixel and how strongly. Tables are (prototypes, pixels)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from protoseg.kernels.shards import Shard


def all_negatives(
    cosines: Tensor,
    best: Tensor,
    own: Tensor,
    classes: Tensor,
    target: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """exp(cosine / tau - shift) of every prototype of this rank, its sum and the shift.

    Args:
        cosines: (C*K, n). best: (C, n) their largest in each class. own: (K, n) those of the own class.
        classes: (n,) own class on this rank, -1 for none.
        target: (n,) in [0, C*K) or -1 where the own class's other prototypes are left out; None where they count.

    Returns:
        (C*K, n) table, (n,) sum, (n,) shift.
    """
    if target is None:
        shift = best.amax(0) / temperature
        mass = torch.add(-shift, cosines, alpha=1 / temperature).exp_()
    else:
        C, K = len(best), len(own)
        index = classes.clamp(min=0).expand(1, K, -1)  # 1 K n
        left_out = torch.where(classes >= 0, -torch.inf, own / temperature)[None]
        mass = cosines * (1 / temperature)
        mass.view(C, K, -1).scatter_(0, index, left_out)
        given = target.clamp(min=0)[None]  # 1 n
        mass.scatter_(0, given, cosines.gather(0, given) / temperature)
        shift = mass.amax(0)
        mass.sub_(shift).exp_()
    return mass, mass.sum(0), shift


def drawn_negatives(
    cosines: Tensor,
    own: Tensor,
    classes: Tensor,
    target: Tensor | None,
    negatives: Tensor,
    weight: float,
    temperature: float,
    shard: Shard | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`all_negatives` where other classes are seen through a drawn sample of prototypes only.

    Args:
        negatives: (M,) drawn prototypes in [0, C*K), -1 for one that another rank holds.
        weight: what each of them stands for, C*K / M.

    Returns:
        (M, n) table of the drawn, 0 where they are of the pixel's own class; (K, n) table of the own class, 0 where the
        class is not here; (n,) sum over all ranks, (n,) shift.
    """
    K = len(own)
    here = classes >= 0
    near = torch.where(here, own / temperature, -torch.inf)  # K n
    if target is not None:
        given = torch.arange(K, device=own.device)[:, None] == target % K
        near.masked_fill_(~given, -torch.inf)
    far = cosines.index_select(0, negatives.clamp(min=0)).mul_(1 / temperature).add_(math.log(weight))  # M n
    far.masked_fill_((negatives // K)[:, None] == classes, -torch.inf)
    far.masked_fill_((negatives < 0)[:, None], -torch.inf)
    shift = torch.maximum(near.amax(0), far.amax(0))
    shift = shift if shard is None else shard.largest(shift)
    near, far = near.sub_(shift).exp_(), far.sub_(shift).exp_()
    total = far.sum(0) + near.sum(0)
    return far, near, total if shard is None else shard.total(total), shift


def add_drawn(weights: Tensor, far: Tensor, near: Tensor, negatives: Tensor, classes: Tensor) -> None:
    """In place: what `drawn_negatives` gave, weighted, joins the (C*K, n) weights of all prototypes."""
    K = len(near)
    weights.index_add_(0, negatives.clamp(min=0), far)
    weights.view(-1, K, weights.shape[1]).scatter_add_(0, classes.clamp(min=0).expand(1, K, -1), near[None])
