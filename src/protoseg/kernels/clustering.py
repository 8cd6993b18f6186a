"""Eq. (4) and Eq. (8), all classes at once, by scaling vectors and segment sums.

With E = exp(cosine / kappa) and one factor for each prototype and each pixel, a round of the transport is a segment
sum, a gather and a row sum. A constant per class cancels, since every pixel's row is brought to 1 afterwards, so
factors are kept relative to their class: with a = 2 / kappa, E is in [exp(-a/2), exp(a/2)], a prototype's factor in
[1/K, exp(a)] and a pixel's mass in [exp(-2a)/K, K] after any number of rounds. Where that fits the type, the result
equals the log-domain rounds of `method.clustering`.

Between two sums over ranks stands one piece of work: an operator of `clustering_cpu` where a compiler made it, Triton's
kernels on a GPU, the PyTorch lines here elsewhere. All sum over ranks the same tables in the same order, so ranks need
not agree on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.kernels import clustering_cpu, gpu

PIECE = 1024  # rows
PARTS, GRID = 64, 8_192  # of a segment at most; of all segments about, where each part is one sum of many threads
PART = 512  # pixels of a part at least, were all pixels in one segment
LARGEST_EXPONENT = {torch.float32: 42.0, torch.float64: 340.0}  # of a: exp(-2a)/K is still a normal number

Reduction = Callable[[Tensor], Tensor]


def scaling_applies(dtype: torch.dtype, kappa: float) -> bool:
    """Whether no factor and no mass can leave the range of the type."""
    return 2 / kappa < LARGEST_EXPONENT.get(dtype, 0.0)


def transport_plan(
    own: Tensor, classes: Tensor, num_classes: int, kappa: float, iterations: int, total: Reduction
) -> Tensor:
    """The transport plan between the pixels of each class and its K prototypes, each with an equal share.

    Args:
        own: (N, K) cosine of each pixel with the prototypes of its own class.
        classes: (N,) class of a pixel, -1 where it has none.
        total: sum over ranks.

    Returns:
        (N, K) plan, rows sum to 1 (but for pixels without a class, which mean nothing).
    """
    rounds = _rounds(own, classes, num_classes, kappa, iterations, total)
    plan = rounds.kernel * _factors(rounds.sums).index_select(0, classes.clamp(min=0))
    return plan / plan.sum(1, keepdim=True)


def balanced_index(
    own: Tensor,
    classes: Tensor,
    num_classes: int,
    kappa: float,
    iterations: int,
    few: int,
    lone: bool,
    total: Reduction,
    alone: bool = False,
) -> Tensor:
    """(N,) arg-max of each row of `transport_plan`, without the plan.

    Args:
        few: a class of fewer pixels takes its nearest prototypes. lone: a class's only pixel takes the first.
        alone: whether `total` gives back what it gets: a round on a GPU is then one launch.
    """
    if gpu.way(own.device, own.dtype) is not None:
        from protoseg.kernels.gpu import segments

        others = None if alone else total
        return segments.balanced_index(own, classes, num_classes, kappa, iterations, few, lone, others)
    rounds = _rounds(own, classes, num_classes, kappa, iterations, total)
    if rounds.ordered is not None:
        ordered, order, starts = rounds.ordered
        return torch.ops.protoseg.largest_mass(ordered, order, starts, rounds.sums, rounds.counts, own, few, lone)
    mine = classes.clamp(min=0)
    mass = rounds.kernel * _factors(rounds.sums).index_select(0, mine)
    counts = rounds.counts.index_select(0, mine)
    if few:
        mass = torch.where((counts < few)[:, None], own, mass)
    return mass.argmax(1).masked_fill_(counts == 1, 0) if lone else mass.argmax(1)


def log_plan(
    own: Tensor,
    classes: Tensor,
    num_classes: int,
    log_shares: Tensor,
    kappa: float,
    iterations: int,
    total: Reduction,
    largest: Reduction,
) -> Tensor:
    """(N, K) log of the plan for any kappa, in the log domain, by Triton's kernels; see `gpu.segments.log_plan`."""
    from protoseg.kernels.gpu import segments

    return segments.log_plan(own, classes, num_classes, log_shares, kappa, iterations, total, largest)


def segment_sums(rows: Tensor, index: Tensor, count: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(count, D) sum and (count,) number of the (N, D) rows of each index in [0, count); -1 belongs nowhere.

    Every sum has one order: unlike atomic additions it gives the same bits every time, on a GPU too.

    Args:
        weights: (N,) what each row is multiplied by; None: 1.
    """
    if gpu.way(rows.device, rows.dtype) is not None:
        from protoseg.kernels.gpu import segments

        return segments.segment_sums(rows, index, count, weights)
    if clustering_cpu.takes(rows, rows if weights is None else weights):
        return torch.ops.protoseg.segment_sums(rows, index, count, weights)
    ordered = _ordered(index, count)
    return _sums(rows, ordered, weights), ordered.counts.to(rows.dtype)


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


class _Rounds(NamedTuple):
    """What all rounds but the arg-max of the last leave.

    Attributes:
        kernel: (N, K) exp(cosine / kappa).
        ordered: kernel, pixels and starts of `clustering_cpu.first_sums`, where it took them.
        sums: (C, K) over all pixels of all ranks. counts: (C,) pixels of each class.
    """

    kernel: Tensor
    ordered: tuple[Tensor, Tensor, Tensor] | None
    sums: Tensor
    counts: Tensor


def _rounds(own: Tensor, classes: Tensor, num_classes: int, kappa: float, iterations: int, total: Reduction) -> _Rounds:
    kernel = (own * (1 / kappa)).exp_()
    K = own.shape[1]
    ordered = None
    if clustering_cpu.takes(kernel):
        values, order, starts, table = torch.ops.protoseg.first_sums(kernel, classes, num_classes)
        ordered = (values, order, starts)

        def again(sums: Tensor) -> Tensor:
            return torch.ops.protoseg.next_sums(values, starts, sums)

    else:
        kernel = kernel.contiguous()
        mine = classes.clamp(min=0)
        summed = _summing(classes, num_classes)
        table = summed(F.pad(kernel, (0, 1), value=1.0))

        def again(sums: Tensor) -> Tensor:
            return summed(kernel / (kernel * _factors(sums).index_select(0, mine)).sum(1, keepdim=True))

    table = total(table)  # C K+1
    sums, counts = table[:, :K], table[:, K]
    for _ in range(iterations - 1):
        sums = total(again(sums))
    return _Rounds(kernel, ordered, sums, counts)


def _factors(sums: Tensor) -> Tensor:
    """(C, K) what gives every prototype of a class the same mass, relative to the class's mean."""
    sums = sums.clamp(min=torch.finfo(sums.dtype).tiny)  # an absent class
    return sums.mean(1, keepdim=True) / sums


class _Ordered(NamedTuple):
    """Rows by segment, those of none in a segment of their own at the end.

    Attributes:
        rows: (N,) index of the rows, those of a segment together and in their own order.
        starts: ((count + 1) * parts,) where each part of each segment begins in it.
        counts: (count,) rows of each segment.
    """

    rows: Tensor
    starts: Tensor
    counts: Tensor


def adds_atomically(device: torch.device) -> bool:
    """Whether `index_add_` adds there in an order that differs from run to run, and so in its last bits."""
    return device.type != "cpu"


def _ordered(index: Tensor, count: int) -> _Ordered:
    """The (N,) index in [0, count), -1 for nowhere, sorted; how many operations depends on the device alone."""
    order = torch.sort(torch.where(index < 0, count, index), stable=True)
    ends = torch.searchsorted(order.values, torch.arange(count + 2, device=index.device))
    starts, counts = ends[:-1], ends.diff()
    if adds_atomically(index.device):  # a thread sums a part: one class may hold most of the pixels
        parts = max(1, min(PARTS, GRID // (count + 1), -(-len(index) // PART)))
        before = counts[:, None] * torch.arange(parts, device=index.device)
        starts = (starts[:, None] + before.div_(parts, rounding_mode="floor")).flatten()
    return _Ordered(order.indices, starts, counts[:-1])


def _sums(rows: Tensor, ordered: _Ordered, weights: Tensor | None = None) -> Tensor:
    """(count, D) sum of the (N, D) rows of each segment: first of each part, then of the parts, each in its order."""
    count = len(ordered.counts)
    each = None if weights is None else weights[ordered.rows]
    sums = F.embedding_bag(ordered.rows, rows, ordered.starts, mode="sum", per_sample_weights=each)
    return sums.view(count + 1, -1, rows.shape[1])[:count].sum(1) if adds_atomically(rows.device) else sums[:count]


def _summing(index: Tensor, count: int) -> Callable[[Tensor], Tensor]:
    """(N, D) rows -> (count, D) sum of those of each index in [0, count), -1 for nowhere, always in the same order."""
    if not adds_atomically(index.device):  # one order as it is, and rows of K numbers are too short to be sorted for
        segments = torch.where(index < 0, count, index)  # the last row is dropped
        return lambda rows: rows.new_zeros(count + 1, rows.shape[1]).index_add_(0, segments, rows)[:-1]
    ordered = _ordered(index, count)
    return lambda rows: _sums(rows, ordered)
