"""The one door to the fast ways. What `method` defines in plain lines stays the definition and the oracle; a caller
asks here whether a faster way applies, and takes the plain lines where it does not.

| what | fast way | where not |
|---|---|---|
| classes at feature size, and their number | `gpu.labels.labelled` | no GPU, no Triton; `plain_only()` |
| scores, losses and their gradient | `similarity.one_pass` | `torch.compile`, `torch.func`; `plain_only()` |
| norms before the unit length | `embedding.normed_rows` | `torch.compile`, `torch.func`, tracing; `plain_only()` |
| scores alone, without gradient | `similarity.class_cosines` | `torch.compile`, export, tracing; `plain_only()` |
| transport plan, arg-max | `clustering.transport_plan`, `balanced_index` | small kappa, `torch.func`; `plain_only()` |
| log of the plan | `clustering.log_plan` | no GPU, no Triton; `torch.compile`, `torch.func`; `plain_only()` |
| sums of the update | `clustering.segment_sums` | `torch.func`; `plain_only()` |
| the bilinear resize | `resizing.bilinear` | no GPU, order not asked for; tracing, `torch.func`; `plain_only()` |
| the memory's steps in place | `memory` | no C compiler, no Triton, mixed types, `torch.func`; `plain_only()` |

The answer depends on nothing that may differ between ranks (not on the number of pixels, say): ranks that sum over
each other must all go the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from protoseg.kernels import clustering, gpu, memory
from protoseg.kernels.clustering import balanced_index, log_plan, row_products, segment_sums, transport_plan
from protoseg.kernels.embedding import normed_rows
from protoseg.kernels.memory import momentum_step_, move_, reseed_, usage_step_
from protoseg.kernels.resizing import bilinear, bilinear_adjoint
from protoseg.kernels.shards import Shard
from protoseg.kernels.similarity import Batch, Settings, class_cosines, one_pass

__all__ = [
    "Batch",
    "Settings",
    "Shard",
    "balanced_index",
    "bilinear",
    "bilinear_adjoint",
    "bilinear_applies",
    "class_cosines",
    "class_cosines_apply",
    "labelled",
    "labelled_applies",
    "log_plan",
    "log_plan_applies",
    "memory_steps_apply",
    "momentum_step_",
    "move_",
    "normed_rows",
    "normed_rows_apply",
    "one_pass",
    "one_pass_applies",
    "plain_only",
    "reseed_",
    "row_products",
    "segment_sums",
    "segment_sums_apply",
    "transport_plan",
    "transport_plan_applies",
    "usage_step_",
]

_plain: ContextVar[bool] = ContextVar("plain", default=False)


@contextmanager
def plain_only() -> Iterator[None]:
    """Within it every computation takes the plain lines of `method`: for tests, benchmarks and second derivatives."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def one_pass_applies() -> bool:
    """Whether `head.losses` goes through `one_pass`. A compiler traces the plain lines and fuses them itself."""
    return not (torch.compiler.is_compiling() or _transformed() or _plain.get())


def labelled_applies(labels: Tensor, dtype: torch.dtype) -> bool:
    """Whether the one pass finds classes and their number through `labelled`; it sums what the plain lines sum."""
    return gpu.way(labels.device, dtype) is not None and not (_transformed() or _plain.get())


def labelled(
    sampled: Tensor,
    labels: Tensor,
    num_classes: int,
    ignore_index: int,
    class_weights: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See `gpu.labels.labelled`; a GPU's alone."""
    from protoseg.kernels.gpu import labels as on_gpu

    return on_gpu.labelled(sampled, labels, num_classes, ignore_index, class_weights, dtype)


def normed_rows_apply() -> bool:
    """Whether the `width` norm and the LayerNorm of the embedding go through `normed_rows`."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or _transformed()
    return not (traced or _plain.get())


def _transformed() -> bool:
    """Whether a transform of `torch.func` is at work: it wants the plain lines, to differentiate them itself."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is not None and active()


def class_cosines_apply() -> bool:
    """Whether `head(features)` goes through `class_cosines`."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or _transformed()
    return not (torch.is_grad_enabled() or traced or _plain.get())


def transport_plan_applies(dtype: torch.dtype, kappa: float) -> bool:
    """Whether `clustering.balanced_assignment` goes through `balanced_index`."""
    return clustering.scaling_applies(dtype, kappa) and not (_transformed() or _plain.get())


def log_plan_applies(own: Tensor) -> bool:
    """Whether `clustering.sinkhorn` goes through `log_plan`; it sums over ranks what the plain lines sum."""
    return gpu.way(own.device, own.dtype) is not None and not (_transformed() or _plain.get())


def segment_sums_apply() -> bool:
    """Whether `prototypes.assigned_sums` goes through `segment_sums`."""
    return not (_transformed() or _plain.get())


def bilinear_applies(x: Tensor) -> bool:
    """Whether `method.resizing.bilinear` goes through `bilinear`: where its gradient must have one order."""
    ordered = x.is_cuda and torch.are_deterministic_algorithms_enabled()
    return ordered and not (torch.jit.is_tracing() or _transformed() or _plain.get())


def memory_steps_apply(*tensors: Tensor) -> bool:
    """Whether `method.prototypes` changes the memory through `move_`, `momentum_step_`, `usage_step_`, `reseed_`.

    They hold no sum over ranks, so ranks need not agree on it; but only where they do are they equal to the last bit.
    """
    return memory.takes(*tensors) and not (_transformed() or _plain.get())
