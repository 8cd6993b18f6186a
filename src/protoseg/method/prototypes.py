"""Eq. (8): the C x K x D memory of prototypes: how it starts, how it moves by momentum, how dead ones are re-seeded.

Functions from tensors to tensors, but for those whose name ends in `_`: they write into the buffers, which the head
owns."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from protoseg import kernels
from protoseg.method import ranks
from protoseg.method.clustering import Reduction
from protoseg.method.losses import Errors
from protoseg.method.similarity import SHORTEST, unit

Start = Literal["nested", "random", "data", "truncated_normal"]
MomentumRule = Literal["constant", "bias_corrected", "count_aware"]
NESTED = 0.8  # cosine of a nested prototype with its class's direction; 0.64 with its siblings
USAGE_DECAY = 0.99  # of the moving average of a prototype's share of its class
DEAD_SHARE = 0.1  # a prototype with less than this part of an equal share is idle
CACHED = 400_000  # numbers in one run of classes, see `_class_parts`


class Memory(NamedTuple):
    """All that is remembered between steps.

    Attributes:
        prototypes: (C, K, D) unit vectors.
        weight, length: (C, K), see `momentum_step`.
        usage: (C, K) share of its class's pixels each prototype has, a moving average.
        idle: (C, K) steps in which the class was seen and the prototype had less than `DEAD_SHARE` of an equal share.
    """

    prototypes: Tensor
    weight: Tensor
    length: Tensor
    usage: Tensor
    idle: Tensor


def starting_vectors(num_classes: int, num_prototypes: int, dim: int, start: Start = "random") -> Tensor:
    """(C, K, D) unit vectors to begin with.

    `random` and `data` give near-orthogonal directions: exactly orthogonal within blocks of D vectors, so that no two
    classes start alike (with `data` they only break the first tie; the first pixels replace them). `nested` gives such
    a direction to every class and spreads its prototypes around it, so that the network is asked to part classes from
    the start but not the prototypes of one. `truncated_normal` is the 2022 code's start. In fp32 at least.
    """
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    if start == "truncated_normal":
        vectors = nn.init.trunc_normal_(torch.empty(num_classes, num_prototypes, dim, dtype=dtype), std=0.02)
        return unit(vectors)
    if start != "nested" or num_prototypes == 1 or dim == 1:
        return _near_orthogonal(num_classes * num_prototypes, dim, dtype).view(num_classes, num_prototypes, dim)
    centre = _near_orthogonal(num_classes, dim, dtype)[:, None]  # C 1 D
    aside = torch.randn(num_classes, num_prototypes, dim, dtype=dtype)
    aside = unit(aside - (aside * centre).sum(-1, keepdim=True) * centre)
    return unit(NESTED * centre + math.sqrt(1 - NESTED**2) * aside)


def _near_orthogonal(count: int, dim: int, dtype: torch.dtype) -> Tensor:
    blocks = [nn.init.orthogonal_(torch.empty(min(dim, count - i), dim, dtype=dtype)) for i in range(0, count, dim)]
    return unit(torch.cat(blocks))


def assigned_sums(
    embedding: Tensor, prototype: Tensor, count: int, total: Reduction = ranks.total
) -> tuple[Tensor, Tensor]:
    """Sum and number of the pixels given to each prototype, over all ranks: reduce sums first, decide afterwards.

    Args:
        embedding: (N, D) unit vectors.
        prototype: (N,) index in [0, count), -1 for none.

    Returns:
        (count, D) sums and (count,) counts.
    """
    sums, counts = _local_sums(embedding, prototype, count)
    return _over_ranks(sums, counts, total)


def errors_by_prototype(embedding: Tensor, similarity: Tensor, errors: Tensor, classes: Tensor) -> Errors:
    """The part of `error_sums` that no clustering decides.

    Args:
        embedding: (N, D) unit vectors. similarity: (N, C*K) with every prototype; of equal ones the first is nearest.
        errors: (N, C) of `losses.label_errors`: 1[y = c] - P(c), taken at the labels' own size.
        classes: (N,) class of each pixel, -1 for none.
    """
    C = errors.shape[1]
    known, own = (classes >= 0)[:, None], classes.clamp(min=0)[:, None]  # N 1
    picked = errors.gather(1, own)
    mine = picked * known
    others = errors.scatter(1, own, picked - mine)
    nearest = similarity.unflatten(1, (C, -1)).argmax(2, keepdim=True)  # N C 1
    weights = torch.zeros_like(similarity).unflatten(1, (C, -1)).scatter_(2, nearest, others[..., None])
    return Errors(weights.flatten(1).T @ embedding, mine[:, 0])


def error_sums(
    embedding: Tensor, prototype: Tensor, errors: Errors, total: Reduction = ranks.total
) -> tuple[Tensor, Tensor]:
    """`assigned_sums` of what the classes still get wrong (`update_from="errors"`).

    A pixel counts for the prototype it was given by how much of its probability its class lacks, 1 - P(y given i), and
    against the nearest prototype of every other class by the probability that class takes, P(c given i). A class's mean
    cannot turn away from its neighbours; this sum does. Moved by it, a prototype comes to rest where it points along

        sum over i of (1[y_i = c] - P(c given i)) x_i,

    which is what the best softmax regression on vectors of unit length does: the direction is that of the
    cross-entropy's gradient, taken without an optimiser, and every prototype stays a weighted sum of pixels. It is not
    in the paper; learning vector quantisation (Kohonen 1990) moves its prototypes by the same signs.

    Args:
        embedding: (N, D) unit vectors.
        prototype: (N,) index in [0, C*K) of the pixel's own class, -1 for none.
        errors: of `errors_by_prototype`.

    Returns:
        (C*K, D) sums and (C*K,) how many pixels each was given.
    """
    sums, counts = _local_sums(embedding, prototype, len(errors.taken), errors.lacking)
    return _over_ranks(sums + errors.taken, counts, total)


def _local_sums(
    embedding: Tensor, prototype: Tensor, count: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """This rank's part of `assigned_sums`, each pixel times its weight of (N,)."""
    if kernels.segment_sums_apply():
        return kernels.segment_sums(embedding, prototype, count, weights)
    index = torch.where(prototype < 0, count, prototype)  # pixels without one go to a row that is dropped
    weighted = embedding if weights is None else embedding * weights[:, None]
    sums = embedding.new_zeros(count + 1, embedding.shape[1]).index_add_(0, index, weighted)[:count]
    counts = embedding.new_zeros(count + 1).index_add_(0, index, embedding.new_ones(len(embedding)))[:count]
    return sums, counts


def _over_ranks(sums: Tensor, counts: Tensor, total: Reduction) -> tuple[Tensor, Tensor]:
    if total is not ranks.total or ranks.world_size() == 1:
        return total(sums), total(counts)
    flat = total(torch.cat([sums, counts[:, None]], 1))  # one message for both
    return flat[:, :-1], flat[:, -1]


def momentum_step(
    prototypes: Tensor,
    weight: Tensor,
    length: Tensor,
    sums: Tensor,
    counts: Tensor,
    *,
    momentum: float,
    rule: MomentumRule = "constant",
    count_cap: float = 1000.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (8): p <- mu p + (1 - mu) m, m the unit mean of the pixels given to p; then unit length again.

    `constant` is the paper's rule. `bias_corrected` divides by the weight seen so far, (1 - mu) / (1 - mu^hits), so
    that all hits count alike until there are many; it differs from `constant` only where the start counts for nothing
    (`start="data"`). `count_aware` weighs a step by its pixels (up to `count_cap`) and averages the means
    themselves, not their directions, so a step of 5 pixels moves less than one of 50,000. A prototype keeps its bits
    without a pixel, with a sum that is not finite, and where sum or result has no direction (`SHORTEST`), as a sum of
    errors has none where a class lacks nothing.

    Args:
        prototypes: (C, K, D) unit vectors.
        weight: (C, K) weight of what the prototype holds, 0 for nothing; see `starting_weight`.
        length: (C, K) length of the accumulated mean whose direction the prototype is (`count_aware`; otherwise 1).
        sums, counts: (C*K, D), (C*K,) from `assigned_sums`.
        momentum: mu.

    Returns:
        The new prototypes, weight and length.
    """
    sums, counts = sums.view_as(prototypes), counts.view_as(weight)
    size = torch.linalg.vector_norm(sums, dim=-1)
    hit = (counts > 0) & (size >= SHORTEST) & (size < torch.inf)  # C K; of nan neither holds
    q = counts.clamp(max=count_cap) if rule == "count_aware" else torch.ones_like(weight)
    new_weight = momentum * weight + q
    step = q / new_weight.clamp(min=1e-12)  # C K
    if rule == "constant":  # a first hit (weight 0) replaces the start, every other moves by 1 - mu
        step = torch.ones_like(weight).masked_fill(weight > 0, 1 - momentum)
    step = step[..., None].to(sums.dtype)
    if rule == "count_aware":
        old, mean = prototypes * length[..., None], sums / counts.clamp(min=1)[..., None]
    else:
        old, mean = prototypes, sums / size[..., None]
    moved = (1 - step) * old + step * mean
    reached = torch.linalg.vector_norm(moved, dim=-1)
    hit = hit & (reached >= SHORTEST)
    new_length = reached if rule == "count_aware" else length
    return (
        torch.where(hit[..., None], moved / reached[..., None], prototypes),
        torch.where(hit, new_weight, weight),
        torch.where(hit, new_length, length),
    )


def starting_weight(start: Start, momentum: float, rule: MomentumRule, count_cap: float = 1000.0) -> float:
    """Weight of a start that is to count as much as a memory in its steady state; `data`: 0, it counts for nothing."""
    steady = (count_cap if rule == "count_aware" else 1.0) / max(1 - momentum, 1e-12)
    return 0.0 if start == "data" else steady


def least_like_their_own(embedding: Tensor, best: Tensor, classes: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """For each class, over all ranks, the labelled pixel that is least similar to its own nearest prototype.

    Ties go to the pixel that comes first in the concatenated batch, so every rank agrees.

    Args:
        embedding: (N, D); best: (N,) cosine with the nearest prototype of the own class; classes: (N,), -1 for none.

    Returns:
        (C, D) embedding of that pixel (zeros for an absent class) and (C,) whether there is one.
    """
    n = len(embedding)
    segments = torch.where(classes < 0, num_classes, classes)
    miss = best.new_full((num_classes + 1,), -torch.inf).scatter_reduce_(0, segments, -best, "amax")
    miss = ranks.largest(miss)
    below = ranks.offset(n, embedding.device)  # how many pixels come before this rank's
    position = below + torch.arange(n, device=embedding.device)
    lowest = torch.iinfo(torch.int64).min
    first = torch.full((num_classes + 1,), lowest, device=embedding.device)
    candidate = -best == miss.index_select(0, segments)
    first.scatter_reduce_(0, segments, torch.where(candidate, -position, lowest), "amax")
    local = -ranks.largest(first)[:num_classes] - below  # C, index on this rank, where it is on this rank
    found = miss[:num_classes].isfinite()
    mine = found & (local >= 0) & (local < n)
    rows = embedding[local.clamp(0, max(n - 1, 0))] if n else embedding.new_zeros(num_classes, embedding.shape[1])
    return ranks.total(torch.where(mine[:, None], rows, 0)), found


def move_(
    memory: Memory,
    embedding: Tensor,
    moving: Tensor,
    verdict: Tensor,
    *,
    momentum: float,
    rule: MomentumRule,
    count_cap: float,
    total: Reduction = ranks.total,
    summed: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`assigned_sums` and `momentum_step`, into the memory.

    Args:
        embedding: (N, D) unit vectors. moving: (N,) prototype each moves, in [0, C*K), -1 for none.
        verdict: () number; where it is not finite nothing moves.
        momentum, rule, count_cap: see `momentum_step`. total: sum over ranks.
        summed: sums and counts over all ranks to take instead of those of `assigned_sums`.

    Returns:
        (C, K) pixels of each prototype.
    """
    C, K, _ = memory.prototypes.shape
    fused = kernels.memory_steps_apply(*memory, embedding, verdict)
    alone = total is not ranks.total or ranks.world_size() == 1  # nothing to sum with others
    if fused and alone and summed is None:
        counts = kernels.move_(*memory[:3], embedding, moving, verdict, momentum, rule, count_cap)
        return counts.view(C, K)
    sums, counts = assigned_sums(embedding, moving, C * K, total) if summed is None else summed
    if fused:
        kernels.momentum_step_(*memory[:3], sums, counts, verdict, momentum, rule, count_cap)
        return counts.view(C, K)
    moves = torch.where(verdict.isfinite(), counts, 0).to(memory.weight.dtype)
    for part in _class_parts(memory.prototypes):
        rows = slice(part.start * K, part.stop * K)
        moved = momentum_step(
            memory.prototypes[part],
            memory.weight[part],
            memory.length[part],
            sums[rows].to(memory.prototypes.dtype),
            moves[rows],
            momentum=momentum,
            rule=rule,
            count_cap=count_cap,
        )
        for held, now in zip(memory, moved):
            held[part] = now
    return counts.view(C, K)


def note_usage_(memory: Memory, counts: Tensor, verdict: Tensor) -> None:
    """The log of who serves how many pixels, into `memory.usage` and `memory.idle`; an absent class keeps its bits.

    Args:
        counts: (C, K) pixels of each prototype over all ranks.
        verdict: () number; where it is not finite nothing is noted.
    """
    usage, idle = memory.usage, memory.idle
    counts = counts.to(usage.dtype)
    dead = DEAD_SHARE / counts.shape[1]
    if kernels.memory_steps_apply(usage, idle, counts, verdict):
        kernels.usage_step_(usage, idle, counts, verdict, USAGE_DECAY, dead)
        return
    pixels = counts.sum(1, keepdim=True)  # C 1
    present = (pixels > 0) & verdict.isfinite()
    usage.copy_(torch.where(present, USAGE_DECAY * usage + (1 - USAGE_DECAY) * counts / pixels.clamp(min=1), usage))
    idle.copy_(torch.where(present, torch.where(usage < dead, idle + 1, 0), idle))


def reseed_(memory: Memory, embedding: Tensor, moving: Tensor, verdict: Tensor, after: int) -> None:
    """Set at most one dead prototype of each class, the longest idle, on the pixel that the others serve worst.

    Args:
        embedding: (N, D) unit vectors. moving: (N,) prototype each has moved, -1 for none.
        verdict: () number; where it is not finite nothing is seeded.
        after: steps of idleness from which a prototype is dead.
    """
    C, K, _ = memory.prototypes.shape
    if kernels.memory_steps_apply(*memory, embedding, verdict) and ranks.world_size() == 1:
        kernels.reseed_(*memory, embedding, moving, verdict, after)
        return
    prototypes, weight, length, usage, idle = memory
    flat = prototypes.to(embedding.dtype).flatten(0, 1)  # CK D
    near = kernels.row_products(embedding, flat, moving.clamp(min=0))  # N
    vectors, found = least_like_their_own(embedding, near, moving.div(K, rounding_mode="floor"), C)
    longest = idle.argmax(1, keepdim=True)  # C 1
    due = (idle.gather(1, longest) >= after) & found[:, None] & verdict.isfinite()
    index = longest[..., None].expand(-1, 1, prototypes.shape[2])  # C 1 D, the only rows that may change
    rows = torch.where(due[..., None], unit(vectors)[:, None].to(prototypes.dtype), prototypes.gather(1, index))
    prototypes.scatter_(1, index, rows)
    seeded = due & (torch.arange(K, device=longest.device) == longest)  # C K
    for held, fresh in ((weight, 1.0), (length, 1.0), (usage, 1 / K), (idle, 0.0)):
        held.masked_fill_(seeded, fresh)


def pairwise_cosine(prototypes: Tensor) -> Tensor:
    """(C,) mean cosine between the different prototypes of a class: 1 means they have collapsed; nan for K = 1."""
    K = prototypes.shape[1]
    gram = prototypes @ prototypes.transpose(1, 2)  # C K K
    off = gram.sum((1, 2)) - gram.diagonal(dim1=1, dim2=2).sum(1)
    return off / (K * (K - 1)) if K > 1 else torch.full_like(off, torch.nan)


def _class_parts(prototypes: Tensor) -> list[slice]:
    """Runs of classes small enough for a CPU's cache: with 847 classes fresh memory cost ten times the arithmetic."""
    C, K, D = prototypes.shape
    step = C if prototypes.device.type != "cpu" else max(1, CACHED // (K * D))
    return [slice(c, min(c + step, C)) for c in range(0, C, step)]
