"""The steps of the prototypes' memory in place, by `clustering_cpu` or, on a GPU, by `gpu.memory`: `method.prototypes`
defines them, and says what the arguments are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from protoseg.kernels import clustering_cpu, gpu


def takes(*tensors: Tensor) -> bool:
    """Whether one of the two takes these floating tensors: contiguous, all of one type and on one device."""
    first = tensors[0]
    if not all(t.is_contiguous() and t.dtype == first.dtype and t.device == first.device for t in tensors):
        return False
    return gpu.way(first.device, first.dtype) is not None or clustering_cpu.takes(*tensors)


def momentum_step_(prototypes: Tensor, weight: Tensor, length: Tensor, *step: Any) -> None:
    """`method.prototypes.momentum_step` with the verdict after the counts: nothing moves where it is not finite."""
    _of(prototypes).momentum_step_(prototypes, weight, length, *step)


def move_(prototypes: Tensor, weight: Tensor, length: Tensor, *step: Any) -> Tensor:
    """`momentum_step_` with pixels and the prototypes they move in place of sums and counts; (C*K,) counts."""
    counts: Tensor = _of(prototypes).move_(prototypes, weight, length, *step)
    return counts


def usage_step_(usage: Tensor, idle: Tensor, counts: Tensor, verdict: Tensor, decay: float, dead: float) -> None:
    """`method.prototypes.note_usage_`."""
    _of(usage).usage_step_(usage, idle, counts, verdict, decay, dead)


def reseed_(prototypes: Tensor, *rest: Any) -> None:
    """`method.prototypes.reseed_` of one process."""
    _of(prototypes).reseed_(prototypes, *rest)


def _of(tensor: Tensor) -> Any:
    if gpu.way(tensor.device, tensor.dtype) is None:
        return torch.ops.protoseg
    from protoseg.kernels.gpu import memory

    return memory
