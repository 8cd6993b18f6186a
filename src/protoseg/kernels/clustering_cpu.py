"""`clustering.c` as operators of PyTorch, `torch.ops.protoseg.*`: a compiler takes each as one node of its graph.

Each is one call into C, one fused piece of work. Arguments are of one floating type, float32 or float64, on the CPU."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.library import custom_op

from protoseg.kernels import native

RULES = {"constant": 0, "bias_corrected": 1, "count_aware": 2}


@cache
def _library() -> ctypes.CDLL | None:
    return native.load(Path(__file__).with_name("clustering.c"))


def available() -> bool:
    """Whether a compiler made the library; asked once in a process."""
    return _library() is not None


# All that `torch.compiler.assume_constant_result` does, without the 1.4 s that it imports.
available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def takes(*tensors: Tensor) -> bool:
    """Whether the operators take these floating tensors: all on the CPU, all of one of the types."""
    return native.alike(*tensors) and available()


def _call(function: str, *arguments: Tensor | int | float | None) -> None:
    native.call(_library(), function, *arguments)


def _grouped(classes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(N,) int32 pixels in the order of their classes, and (count + 1,) where each class starts in it."""
    order, starts = classes.new_empty(len(classes), dtype=torch.int32), classes.new_empty(count + 1)
    _call("group_by_class", classes.contiguous(), len(classes), count, order, starts)
    return order, starts


@custom_op("protoseg::first_sums", mutates_args=(), device_types="cpu")
def first_sums(kernel: Tensor, classes: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels in the order of their classes, and the first sums of the transport.

    Args:
        kernel: (N, K), any strides. classes: (N,) int64, negative for none.

    Returns:
        (K, N) kernel in order, (N,) int32 pixels in order, (C+1,) where each class starts, and (C, K+1) sums with the
        number of pixels last. What is beyond the last class's end means nothing.
    """
    n, K = kernel.shape
    order, starts = _grouped(classes, num_classes)
    ordered, table = kernel.new_empty(K, n), kernel.new_empty(num_classes, K + 1)
    _call(
        native.typed("first_sums", kernel), kernel, *kernel.stride(), n, K, num_classes, order, starts, ordered, table,
        torch.get_num_threads(),
    )  # fmt: skip
    return ordered, order, starts, table


@first_sums.register_fake
def _(kernel: Tensor, classes: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, K = kernel.shape
    return (
        kernel.new_empty(K, n),
        classes.new_empty(n, dtype=torch.int32),
        classes.new_empty(num_classes + 1),
        kernel.new_empty(num_classes, K + 1),
    )


@custom_op("protoseg::next_sums", mutates_args=(), device_types="cpu")
def next_sums(ordered: Tensor, starts: Tensor, sums: Tensor) -> Tensor:
    """(C, K) sums after a round that started from `sums`, (C, K)."""
    K, n = ordered.shape
    found = sums.new_empty(len(sums), K)
    _call(
        native.typed("next_sums", ordered), ordered, n, K, len(sums), starts, sums, sums.stride(0), found,
        torch.get_num_threads(),
    )  # fmt: skip
    return found


@next_sums.register_fake
def _(ordered: Tensor, starts: Tensor, sums: Tensor) -> Tensor:
    return sums.new_empty(len(sums), ordered.shape[0])


@custom_op("protoseg::largest_mass", mutates_args=(), device_types="cpu")
def largest_mass(
    ordered: Tensor, order: Tensor, starts: Tensor, sums: Tensor, counts: Tensor, own: Tensor, few: int, lone: bool
) -> Tensor:
    """(N,) int64 prototype of largest mass in a pixel's row of the plan, 0 where void.

    Args:
        counts: (C,) pixels of each class over all ranks. own: (N, K) cosines.
        few: a class of fewer pixels takes its nearest prototypes. lone: a class's only pixel takes the first.
    """
    K, n = ordered.shape
    chosen = order.new_empty(n, dtype=torch.int64)
    _call(
        native.typed("largest_mass", ordered), ordered, n, K, len(sums), order, starts, sums, sums.stride(0), counts,
        counts.stride(0), own, *own.stride(), few, lone, chosen, torch.get_num_threads(),
    )  # fmt: skip
    return chosen


@largest_mass.register_fake
def _(
    ordered: Tensor, order: Tensor, starts: Tensor, sums: Tensor, counts: Tensor, own: Tensor, few: int, lone: bool
) -> Tensor:
    return order.new_empty(len(order), dtype=torch.int64)


@custom_op("protoseg::segment_sums", mutates_args=(), device_types="cpu")
def segment_sums(rows: Tensor, index: Tensor, count: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(count, D) sum, each row times its weight of (N,), and (count,) number of the (N, D) rows of each index; a
    negative one belongs nowhere."""
    order, starts = _grouped(index, count)
    sums, counts = rows.new_empty(count, rows.shape[1]), rows.new_empty(count)
    _call(
        native.typed("segment_sums", rows), rows.contiguous(), None if weights is None else weights.contiguous(),
        order, starts, rows.shape[1], count, sums, counts, torch.get_num_threads(),
    )  # fmt: skip
    return sums, counts


@segment_sums.register_fake
def _(rows: Tensor, index: Tensor, count: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return rows.new_empty(count, rows.shape[1]), rows.new_empty(count)


MEMORY = ("prototypes", "weight", "length")


@custom_op("protoseg::momentum_step_", mutates_args=MEMORY, device_types="cpu")
def momentum_step_(
    prototypes: Tensor, weight: Tensor, length: Tensor, sums: Tensor, counts: Tensor, verdict: Tensor,
    momentum: float, rule: str, count_cap: float,
) -> None:  # fmt: skip
    """`method.prototypes.momentum_step` in place, nothing where `verdict`, (), is not finite; touches rows hit only."""
    C, K, D = prototypes.shape
    _call(
        native.typed("momentum_step", prototypes), prototypes, weight, length, sums.contiguous(), counts.contiguous(),
        verdict, C * K, D, momentum, RULES[rule], count_cap, torch.get_num_threads(),
    )  # fmt: skip


@custom_op("protoseg::move_", mutates_args=MEMORY, device_types="cpu")
def move_(
    prototypes: Tensor, weight: Tensor, length: Tensor, embedding: Tensor, moving: Tensor, verdict: Tensor,
    momentum: float, rule: str, count_cap: float,
) -> Tensor:  # fmt: skip
    """`momentum_step_` from the (N, D) pixels and the (N,) prototypes they move, without a table of sums.

    Returns:
        (C*K,) pixels of each prototype.
    """
    C, K, D = prototypes.shape
    order, starts = _grouped(moving, C * K)
    counts = embedding.new_empty(C * K)
    _call(
        native.typed("move", prototypes), prototypes, weight, length, embedding.contiguous(), order, starts, verdict,
        C * K, D, momentum, RULES[rule], count_cap, counts, torch.get_num_threads(),
    )  # fmt: skip
    return counts


@move_.register_fake
def _(
    prototypes: Tensor, weight: Tensor, length: Tensor, embedding: Tensor, moving: Tensor, verdict: Tensor,
    momentum: float, rule: str, count_cap: float,
) -> Tensor:  # fmt: skip
    return embedding.new_empty(weight.numel())


@custom_op("protoseg::usage_step_", mutates_args=("usage", "idle"), device_types="cpu")
def usage_step_(usage: Tensor, idle: Tensor, counts: Tensor, verdict: Tensor, decay: float, dead: float) -> None:
    """`method.prototypes.usage_step` in place, nothing where `verdict` is not finite."""
    C, K = usage.shape
    _call(native.typed("usage_step", usage), usage, idle, counts.contiguous(), verdict, C, K, decay, dead)


@custom_op("protoseg::reseed_", mutates_args=(*MEMORY, "usage", "idle"), device_types="cpu")
def reseed_(
    prototypes: Tensor, weight: Tensor, length: Tensor, usage: Tensor, idle: Tensor, embedding: Tensor, moving: Tensor,
    verdict: Tensor, after: float,
) -> None:  # fmt: skip
    """`method.prototypes.reseed_` of one process; looks at the pixels of classes with a prototype due only."""
    C, K, D = prototypes.shape
    _call(
        native.typed("reseed", prototypes), embedding.contiguous(), moving.contiguous(), len(moving), prototypes,
        weight, length, usage, idle, verdict, C, K, D, after,
    )  # fmt: skip
