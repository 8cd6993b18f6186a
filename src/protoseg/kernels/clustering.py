"""Eq. (4) and the sums of Eq. (8), all classes at once, by scaling vectors and sorted segments.

With E = exp((cosine - 1) / kappa) and one factor for each prototype and each pixel, a round of the transport is a
segment sum, a gather and a row sum. A constant per class cancels, since every pixel's row is brought to 1 afterwards,
so factors are kept relative to their class: with a = 2 / kappa, E is in [exp(-a), 1], a prototype's factor in
[1/K, exp(a)] and a pixel's mass in [exp(-2a)/K, K] after any number of rounds. Where that fits the type, the result
equals the log-domain rounds of `method.clustering`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 1024  # rows
LARGEST_EXPONENT = {torch.float32: 42.0, torch.float64: 340.0}  # of a: exp(-2a)/K is still a normal number


def scaling_applies(dtype: torch.dtype, kappa: float) -> bool:
    """Whether no factor and no mass can leave the range of the type."""
    return 2 / kappa < LARGEST_EXPONENT.get(dtype, 0.0)


def transport_plan(
    own: Tensor, segments: Tensor, num_classes: int, kappa: float, iterations: int, total: Callable[[Tensor], Tensor]
) -> Tensor:
    """The transport plan between the pixels of each class and its K prototypes, each with an equal share.

    Args:
        own: (N, K) cosine of each pixel with the prototypes of its own class.
        segments: (N,) class of a pixel, C where it has none.
        total: sum over ranks.

    Returns:
        (N, K) plan, rows sum to 1.
    """
    kernel = torch.sub(own, 1).mul_(1 / kappa).exp_().contiguous()  # N K
    mass = kernel
    for _ in range(iterations):
        sums = own.new_zeros(num_classes + 1, own.shape[1]).index_add_(0, segments, mass)
        sums = total(sums).clamp(min=torch.finfo(own.dtype).tiny)  # an absent class is never gathered
        factor = sums.mean(1, keepdim=True) / sums
        plan = kernel * factor.index_select(0, segments)
        pixel = plan.sum(1, keepdim=True)
        mass = kernel / pixel
    return plan / pixel


def segment_sums(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """(count, D) sum of the (N, D) rows of each index in [0, count]; `count` itself is for rows that belong nowhere.

    Sorted first, so every sum has one order: unlike atomic additions it gives the same bits every time, on a GPU too.
    """
    order = torch.sort(index, stable=True)
    starts = torch.searchsorted(order.values, torch.arange(count + 1, device=index.device))
    return F.embedding_bag(order.indices, rows, starts, mode="sum")[:count]


def row_products(rows: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """(N,) inner product of each of the (N, D) rows with its row of the (M, D) table.

    In pieces that stay in cache: at 8192 x 256 a fresh N x D tensor cost 18 times the arithmetic, in page faults.
    """
    step = PIECE if rows.device.type == "cpu" else max(len(rows), 1)
    products = rows.new_empty(len(rows))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        torch.sum(table.index_select(0, index[part]).mul_(rows[part]), 1, out=products[part])
    return products
