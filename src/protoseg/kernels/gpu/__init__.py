"""The Triton kernels, and whether they are at hand. Nothing here imports Triton before a CUDA tensor asks for it.

| file | what |
|---|---|
| `similarity` | Eq. (1), (2), (5): best prototype of each class, log-sum-exp over all, and their gradient |
| `cross_entropy` | Eq. (2) at the labels' size, and its gradient to the class scores |
| `labels` | classes at feature size, and how many labels and pixels have one |
| `rows` | unit length and its adjoint; Eq. (5) and (6) of what pixels were given, and Eq. (7) |
| `segments` | rounds of Eq. (4) over all classes at once; the sums of Eq. (8) |
| `memory` | the momentum of Eq. (8), the log of use, re-seeding, in place |

`way` is asked once by each computation and names how it takes its products:

| way | products | cosines of a band of pixels |
|---|---|---|
| `mm` | PyTorch's | a table, read twice and overwritten by the gradient's weights |
| `ieee`, `tf32` | the kernel's, in that precision of `tl.dot` | never stored, made again for the gradient |
| `bf16` | the kernel's, of numbers rounded to bf16, summed in fp32 | never stored, made again for the gradient |

Features that came in half precision take `bf16`: they have hardly more digits than that. All others take `mm`, whose
products are TF32 where `torch.backends.cuda.matmul` allows it. `tf32` is never taken unasked: `tl.dot` cuts digits off
instead of rounding, and on an H100 bf16 was both nearer and faster. The environment variable PROTOSEG_TRITON names a
way outright or is `off`. Collectives are the same on every way, so ranks that differ in it still meet. A way `tf32x3`
(three TF32 products, near fp32) is gone: under Triton 3.6.0 its results on an H100 were wrong, at more than twice the
time of `mm`."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache

import torch
from torch import Tensor

VARIABLE = "PROTOSEG_TRITON"
FUSED = ("ieee", "tf32", "bf16")
CHOICES = ("auto", "off", "mm", *FUSED)

log = logging.getLogger(__name__)


def way(device: torch.device, dtype: torch.dtype, *, half: bool = False) -> str | None:
    """How the kernels take the products of tensors of this kind; None where the plain lines are to be taken.

    Args:
        half: whether the tensors, fp32 by now, came in half precision (bf16 or fp16).

    Raises:
        ValueError: PROTOSEG_TRITON is none of `CHOICES`.
    """
    if torch.compiler.is_compiling():
        return None
    asked = os.environ.get(VARIABLE, "auto")
    if asked not in CHOICES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(CHOICES)}, given {asked!r}")
    if asked == "off" or dtype not in (torch.float32, torch.float64):
        return None
    if not (device.type == "cuda" or interpreted()) or not at_hand(device):
        return None
    if dtype == torch.float64:  # the other ways exist to save time, and for float64 they would not
        return asked if asked == "ieee" and interpreted() else "mm"
    if asked != "auto":
        return asked
    return "bf16" if half else "mm"


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU: TRITON_INTERPRET=1, set before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def at_hand(device: torch.device) -> bool:
    """Whether Triton is installed and can build and launch a kernel here, tried once (it needs a C compiler too)."""
    try:
        from protoseg.kernels.gpu import rows
    except ImportError as reason:
        log.info("no Triton kernels: %s", reason)
        return False
    try:
        rows.unit(torch.ones(1, 16, device=device), torch.empty(1, 16, device=device))
    except Exception as reason:  # whatever compiler, driver and linker may raise; the plain lines need none of them
        log.info("no Triton kernels: %s: %s", type(reason).__name__, reason)
        return False
    return True


@lru_cache(maxsize=256)
def constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a () tensor, for kernels: as an argument it would be cut to fp32, and as a constant that they are
    compiled for, a weight which changes from step to step would compile them anew each time.

    A step that is captured in a graph must have run before, and its weights stay what they were: graphs hold addresses.
    """
    return torch.full((), value, dtype=dtype, device=device)


def launching_on(tensor: Tensor) -> AbstractContextManager[object]:
    """Within it kernels go to the tensor's device; Triton would send them to the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
