"""The two matrix products of the head, on the faster of the CPU's libraries.

PyTorch sends fp32 `mm` to MKL, which on AMD stays with AVX2; oneDNN, in the same binary, uses AVX-512 and took half
the time (195 against 90 GFLOP/s on one Zen 5 core). Both are full fp32. oneDNN is reached through the operator that
`torch.compile` itself emits for a linear layer; where a build does not have it, `mm` does the work. Without AVX-512 the
two are level (within 10 % on a Zen 3 core) but for the copy that turns oneDNN's second product: there `mm` takes it, in
0.65 to 0.9 times the time."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def mkl_is_level() -> bool:
    """Whether MKL has the vectors that oneDNN has: those of AVX-512 on Intel alone, which nothing here can tell."""
    return torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() != "AVX512"


@cache
def has_onednn(dtype: torch.dtype = torch.float32) -> bool:
    """Whether PyTorch has oneDNN's linear of this type here, tried once on two numbers: bfloat16 wants AVX-512."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        one = torch.ones(1, 1, dtype=dtype)
        return bool(torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], "") == 1)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False


def similarities(prototypes: Tensor, embedding: Tensor) -> Tensor:
    """(P, D), (n, D) -> (P, n) cosines: pixels last, so that every reduction over prototypes runs along vectors."""
    if _onednn_takes(prototypes, embedding):
        return torch.ops.mkldnn._linear_pointwise(prototypes, embedding, None, "none", [], "")
    return prototypes @ embedding.T


def weighted_prototypes(weights: Tensor, prototypes: Tensor, transposed: Tensor, out: Tensor) -> None:
    """Sum of the prototypes, weighted by a column for each pixel: (P, n), (P, D) -> `out` (n, D).

    Args:
        transposed: (D, P) contiguous copy of the prototypes, which oneDNN wants.
    """
    whole = weights.is_contiguous()  # of a slice oneDNN takes a thousand times as long
    if whole and not mkl_is_level() and _onednn_takes(transposed, weights):
        out.copy_(torch.ops.mkldnn._linear_pointwise(transposed, weights.T, None, "none", [], "").T)
    else:
        torch.mm(weights.T, prototypes, out=out)


def _onednn_takes(a: Tensor, b: Tensor) -> bool:
    return a.device.type == "cpu" and a.dtype == b.dtype == torch.float32 and b.numel() > 0 and has_onednn()
