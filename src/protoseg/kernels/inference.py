"""What a frozen head computes: class maxima of prototype products in full precision, bfloat16 or int8, and the arg-max
of bilinearly resized scores without the resized table.

Pixels come last in the products and a band at a time, as in `similarity`. Linear layers go through the library that
`gemm` chose; PyTorch's 1x1 convolution took 2.3 times as long for the same product on one Zen 5 core."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.kernels import gemm
from protoseg.kernels.similarity import CPU_BAND, GPU_BAND

Precision = Literal["full", "bf16", "int8"]
ROUNDED_BAND = 800_000  # products at once on a CPU where they are rounded: int8 has them as int32 and as fp32
FEWEST, MOST = 256, 4096  # pixels of a band on a CPU
MIXED = 300_000  # scores mixed at once on a CPU


@dataclass(frozen=True)
class Table:
    """Prototypes as one product wants them.

    Attributes:
        vectors: (P, D) float, bfloat16 or int8; P prototypes of all classes, of a class side by side.
        step: (P, 1) what an int8 unit is worth; None in floating point.
        centre: (D,) what was taken off every vector before it was rounded, or None. Classes share much of their
            direction, and what they share need not be rounded.
        bias: (P, 1) to be added to every product, or None; in full precision only.
        groups: classes with equally many prototypes: (their ids or None for all, how many classes, prototypes of each),
            in the order of `vectors`.
        num_classes: C.
    """

    vectors: Tensor
    step: Tensor | None
    centre: Tensor | None
    bias: Tensor | None
    groups: tuple[tuple[Tensor | None, int, int], ...]
    num_classes: int


def band_width(prototypes: int, precision: Precision, device: torch.device) -> int:
    """How many pixels to take at once."""
    if device.type != "cpu":
        return max(FEWEST, GPU_BAND // prototypes)
    budget = CPU_BAND if precision == "full" else ROUNDED_BAND
    return min(MOST, max(FEWEST, budget // prototypes // 64 * 64))


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    """(n, D') -> (n, D): W x + b, and ReLU where asked for."""
    if gemm._onednn_takes(rows, weight):
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "relu" if relu else "none", [], "")
    out = F.linear(rows, weight, bias)
    return out.relu_() if relu else out


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(n, D) float -> int8 of the same shape and (n, 1) what a unit of each row is worth: its largest number is 127."""
    largest = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return (rows * (127 / largest)).round_().to(torch.int8), largest / 127


@cache
def int8_reason(device: str) -> str:
    """Why int8 products cannot be made on this kind of device; empty where they can."""
    try:
        one = torch.ones(32, 32, dtype=torch.int8, device=device)
        # laid out as in `_int8_products`: Hopper's library may know no other layout
        right = bool((torch._int_mm(one, one.T) == 32).all())
    except (AttributeError, RuntimeError, NotImplementedError) as reason:
        return str(reason).splitlines()[0]
    return "" if right else "its int8 product is wrong"


def class_maxima(rows: Tensor, table: Table) -> Tensor:
    """(n, D) embedding of any length -> (C, n): for each class the largest p . x + bias, unscaled by the length of x.

    The type is that of `rows`. In bfloat16 on a CPU the products are rounded to bfloat16 before the maximum.
    """
    if table.vectors.dtype == torch.int8:
        integers, unit = quantize(rows)
        assert table.step is not None
        products = _int8_products(table.vectors, integers).to(rows.dtype).mul_(table.step)
        best = _maxima(products, table).mul_(unit.T)
    elif table.vectors.dtype == torch.bfloat16:
        best = _maxima(_bf16_products(table.vectors, rows.bfloat16()), table).to(rows.dtype)
    else:
        products = gemm.similarities(table.vectors, rows)
        best = _maxima(products if table.bias is None else products.add_(table.bias), table)
    return best if table.centre is None else best.add_(rows @ table.centre)


def _maxima(products: Tensor, table: Table) -> Tensor:
    if len(table.groups) == 1:
        _, classes, k = table.groups[0]
        return products.view(classes, k, -1).amax(1)
    best = products.new_empty(table.num_classes, products.shape[1])
    start = 0
    for ids, classes, k in table.groups:
        part = products[start : start + classes * k].view(classes, k, -1)
        assert ids is not None
        best.index_copy_(0, ids, part.amax(1))
        start += classes * k
    return best


def _bf16_products(vectors: Tensor, rows: Tensor) -> Tensor:
    if vectors.device.type == "cuda":
        return torch.mm(vectors, rows.T, out_dtype=torch.float32)
    if vectors.device.type == "cpu" and rows.numel() and gemm.has_onednn(torch.bfloat16):
        return torch.ops.mkldnn._linear_pointwise(vectors, rows, None, "none", [], "")
    return vectors @ rows.T


def _int8_products(vectors: Tensor, rows: Tensor) -> Tensor:
    """(P, D), (n, D) -> (P, n) int32. A GPU wants more than 16 rows and all sides in eights: zeros fill them up."""
    if vectors.device.type == "cpu":
        return torch._int_mm(vectors, rows.T)
    (P, D), n = vectors.shape, len(rows)
    vectors = F.pad(vectors, (0, -D % 8, 0, max(24 - P, -P % 8)))
    rows = F.pad(rows, (0, -D % 8, 0, max(24 - n, -n % 8)))
    return torch._int_mm(vectors, rows.T)[:P, :n].contiguous()


def best_class(rows: Tensor) -> Tensor:
    """(n, C) -> (n,) arg-max. NumPy's runs along vectors on a CPU: at 150 classes three times as fast as PyTorch's."""
    if rows.device.type != "cpu" or rows.dtype not in (torch.float32, torch.float64):
        return rows.argmax(1)
    return torch.from_numpy(rows.numpy().argmax(1))


def taps(size: int, out: int, align_corners: bool, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Half of a bilinear resize: each of `out` outputs mixes (1 - share) of input `low` with share of input `high`."""
    exact = torch.float32 if like.device.type == "mps" else torch.float64
    y = torch.arange(out, device=like.device, dtype=exact)
    source = y * ((size - 1) / max(out - 1, 1)) if align_corners else ((y + 0.5) * (size / out) - 0.5).clamp_(min=0)
    low = source.long().clamp_(max=size - 1)
    return low, (low + 1).clamp_(max=size - 1), (source - low).clamp_(0, 1).to(like.dtype)


def border(labels: Tensor) -> Tensor:
    """(B, h, w) -> indices, in this order, of the pixels of every 2 x 2 square that holds two classes: all that a
    bilinear resize mixes, where both sides are 2 or more."""
    one = labels[:, :-1, :-1]
    mixed = (one != labels[:, 1:, :-1]) | (one != labels[:, :-1, 1:]) | (one != labels[:, 1:, 1:])
    touched = torch.zeros_like(labels, dtype=torch.bool)
    for rows in (slice(None, -1), slice(1, None)):
        for columns in (slice(None, -1), slice(1, None)):
            touched[:, rows, columns] |= mixed
    return touched.flatten().nonzero()[:, 0]


def resized_labels(
    rows: Tensor,
    size: tuple[int, int, int],
    out: tuple[int, int],
    align_corners: bool,
    *,
    weigh: Callable[[Tensor], Tensor] | None = None,
    best: Tensor | None = None,
    error: Tensor | None = None,
    refine: Callable[[Tensor], None] | None = None,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Arg-max over classes of the bilinear resize, exact, with nothing of C numbers per output pixel kept.

    An output pixel mixes four inputs. Where one class is best in all four it is best in every mix of them, so only the
    pixels along the borders of classes are mixed at all.

    Args:
        rows: (B*h*w, C) scores, pixels in the order (b h w); their arg-max must be right even unweighed.
        size: (B, h, w). out: (H, W).
        weigh: (m,) indices of rows -> (m,) positive factors the rows still lack (one over the embedding's length).
        best: (B*h*w,) arg-max of the true rows, if known.
        error: (B*h*w,) by how much the difference of two scores of a row may be wrong; None where the rows are true.
        refine: makes the rows at (m,) indices true. Asked for where a mix of wrong rows does not tell its arg-max.
        dtype: of the labels.

    Returns:
        (B, H, W).
    """
    (B, h, w), (H, W), C = size, out, rows.shape[1]
    best = (best_class(rows) if best is None else best).view(B, h, w)
    if (h, w) == (H, W):
        return best.to(dtype)
    top, bottom, down = taps(h, H, align_corners, rows)
    left, right, across = taps(w, W, align_corners, rows)
    wide = best[:, :, left]  # B h W
    alike = wide == best[:, :, right]
    labels = torch.empty(B, H, W, dtype=dtype, device=rows.device)
    budget = MIXED if rows.device.type == "cpu" else GPU_BAND
    strip, piece = max(1, budget // W), max(1, budget // C)
    # Mixes of wrong rows that do not tell: where, of which rows, in which shares; settled many at once.
    open_: list[tuple[Tensor, Tensor, Tensor]] = []
    left_open = 0

    def settle() -> int:
        """How many are left: none."""
        assert refine is not None
        where, index, share = (torch.cat(part) for part in zip(*open_))
        refine(index.view(-1))
        flat = labels.view(-1)
        for w, i, s in zip(where.split(piece), index.split(piece), share.split(piece)):
            flat[w] = best_class(F.embedding_bag(i, rows, per_sample_weights=s, mode="sum")).to(dtype)
        open_.clear()
        return 0

    for b in range(B):
        for y in range(0, H, strip):
            above, below = top[y : y + strip], bottom[y : y + strip]
            one = wide[b, above]
            sure = alike[b, above] & alike[b, below] & (one == wide[b, below])
            target = labels[b, y : y + strip]
            target.copy_(one)
            over, under = (b * h + above) * w, (b * h + below) * w  # where these rows begin
            for pixels in sure.logical_not_().nonzero().split(piece):
                line, column = pixels.unbind(1)
                a, c, one_side, other = over[line], under[line], left[column], right[column]
                index = torch.stack([a + one_side, a + other, c + one_side, c + other], 1)
                v, u = down[y : y + strip][line], across[column]
                share = torch.stack([(1 - v) * (1 - u), (1 - v) * u, v * (1 - u), v * u], 1)
                if weigh is not None:
                    share = share * weigh(index.view(-1)).view(-1, 4)
                mixed = F.embedding_bag(index, rows, per_sample_weights=share, mode="sum")  # m C
                found = best_class(mixed)
                target[line, column] = found.to(dtype)
                if error is not None:
                    unsure = ~(_ahead(mixed, found) > (share * error[index]).sum(1))  # nan is not sure
                    where = (b * H + y + line) * W + column
                    open_.append((where[unsure], index[unsure], share[unsure]))
                    left_open += len(open_[-1][0])
                    if left_open > piece:
                        left_open = settle()
    if open_:
        settle()
    return labels


def _ahead(rows: Tensor, best: Tensor) -> Tensor:
    """(n, C), (n,) arg-max -> (n,) how far it is ahead of the others. Overwrites the rows."""
    top = rows.gather(1, best[:, None])
    return top[:, 0] - rows.scatter_(1, best[:, None], -torch.inf).amax(1)


def bands(features: Tensor, width: int) -> Iterator[tuple[int, Tensor]]:
    """(B, D', h, w) -> (index of the first, (n, D') rows) in the order (b h w); a view wherever memory allows it."""
    last = features.permute(0, 2, 3, 1)
    if last.is_contiguous():
        rows = last.flatten(0, 2)
        for start in range(0, len(rows), width):
            yield start, rows[start : start + width]
        return
    pixels = features.shape[2] * features.shape[3]
    for b, image in enumerate(features.flatten(2)):  # D' hw
        for start in range(0, pixels, width):
            yield b * pixels + start, image[:, start : start + width].T
