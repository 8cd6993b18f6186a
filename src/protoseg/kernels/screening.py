"""`screening.c`: the nearest class of a pixel by products of 16 bit codes, where the codes can tell, on the CPU.

A pixel x and the prototypes v_p are rounded to whole numbers of 16 bits, q and u_p, which a CPU multiplies twice as
fast as fp32 numbers, and no table of the products is kept: only the best class of a pixel and how far it is ahead. With
x = a (q + e), v_p - centre = s (u_p + e_p) and a, s > 0, two prototypes differ by

    x . (v_i - v_j) / (a s) = q . (u_i - u_j)  +  e . (u_i + e_i - u_j - e_j)  +  q . (e_i - e_j)

(the centre, common to all, is gone), and by Cauchy-Schwarz the last two are together at most

    margin = |e| max_ij |(u_i + e_i) - (u_j + e_j)|  +  |q| max_ij |e_i - e_j|.

A class that is ahead by more is the nearest one whatever was rounded. The pixels of the others, few, are for the caller
to answer in full precision. The margin also holds what full precision itself may round by, so the label is the one that
it gives of the same rows. Codes of 8 bits leave 30 to 100 times as many open (docs/performance.md)."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from protoseg.kernels import native
from protoseg.kernels.inference import Table

LENGTH = 39_000.0  # of codes: a product, at most its square and what rounding adds, leaves 2^29 of 2^31 for a bias
LARGEST = 32_700.0  # code: two products of two such fit in 32 bits
WIDEST = 8192  # channels for which this is so
PAIRED = 2048  # prototypes of which all pairs are looked at
FEWEST = 64  # prototypes for which it pays
FILLED = 0.6  # and share of the lanes that hold a class


@dataclass(frozen=True)
class Screen:
    """Prototypes as `screening.c` wants them.

    Attributes:
        codes: (units, words, lanes, 2) int16: a unit is one prototype of each of `lanes` classes; a word two channels.
        bias: (units, lanes) over `worth`, less what all share, or None. block: (units,) int32, which classes.
        classes: (C,) ids in their order, or None.
        worth: s of the equations. spread: max_ij |(u_i + e_i) - (u_j + e_j)|. own: the rest of the margin, in a s.
        largest_bias: over `worth`; of the whole bias no more than four times this.
    """

    codes: Tensor
    bias: Tensor | None
    block: Tensor
    classes: Tensor | None
    num_classes: int
    worth: float
    spread: float
    own: float
    largest_bias: float


@cache
def _library() -> ctypes.CDLL | None:
    library = native.load(Path(__file__).with_name("screening.c"))
    if library is not None:
        library.lanes.restype = ctypes.c_int64
    return library


@cache
def lanes() -> int:
    """How many classes a vector of this machine holds; 0 where it has no such products."""
    library = _library()
    return 0 if library is None else int(library.lanes())


def pays(table: Table) -> bool:
    """Whether these prototypes would be screened here faster than multiplied in full precision."""
    prototypes, channels = table.vectors.shape
    if not lanes() or table.vectors.dtype != torch.float32 or not native.takes(table.vectors):
        return False
    if prototypes < FEWEST or channels > WIDEST:
        return False
    return prototypes >= FILLED * lanes() * sum(_deepest(table))


def pack(table: Table) -> Screen | None:
    """The codes of a table in full precision; None where all its prototypes are one."""
    P, D = table.vectors.shape
    width, C = lanes(), table.num_classes
    exact = table.vectors.double()
    centre = exact.mean(0)
    apart = exact - centre
    farthest = float(apart.norm(dim=1).amax())
    if not 0 < farthest < math.inf:
        return None
    worth = max(farthest / LENGTH, float(apart.abs().amax()) / LARGEST)
    apart /= worth
    codes = apart.round()  # P D
    bias, largest_bias = None, 0.0
    if table.bias is not None:
        whole = table.bias[:, 0].double() / worth
        bias = whole - (whole.amax() + whole.amin()) / 2  # of what all share only full precision's rounding is counted
        largest_bias = max(float(bias.abs().amax()), float(whole.abs().amax()) / 4)

    # Row p of the table -> its places: lane, and as which prototype of its class. Classes with fewer prototypes than
    # their block's deepest repeat their first, which changes no maximum.
    deepest = _deepest(table)
    starts: list[int] = []
    counts: list[int] = []
    first = 0
    for _, classes, k in table.groups:
        starts += range(first, first + classes * k, k)
        counts += [k] * classes
        first += classes * k
    starts += [0] * (-C % width)
    counts += [1] * (-C % width)
    order = [
        starts[b * width + lane] + (k if k < counts[b * width + lane] else 0)
        for b, depth in enumerate(deepest)
        for k in range(depth)
        for lane in range(width)
    ]
    chosen = torch.tensor(order, device=exact.device)
    words = (D + 1) // 2
    even = codes.new_zeros(P, 2 * words)
    even[:, :D] = codes
    units = even.to(torch.int16)[chosen].view(-1, width, words, 2).transpose(1, 2).contiguous()
    block = torch.tensor([b for b, depth in enumerate(deepest) for _ in range(depth)])
    ids = [ids for ids, _, _ in table.groups]
    return Screen(
        units,
        None if bias is None else bias.float()[chosen].view(-1, width).contiguous(),
        block.to(exact.device, torch.int32),
        None if ids[0] is None else torch.cat([i for i in ids if i is not None]).contiguous(),
        C,
        worth,
        farthest_pair(apart),
        _own(D, farthest_pair(apart - codes), float(exact.norm(dim=1).amax()) / worth, bias is not None),
        largest_bias,
    )


def _own(D: int, off: float, longest: float, biased: bool) -> float:
    """What the codes' best class must be ahead by, in code units, were the pixel not rounded.

    Args:
        off: max_ij |e_i - e_j|. longest: of the prototypes with what they share, over `worth`: full precision rounds
            those.
    """
    pixel, ulp = LENGTH + math.sqrt(D), 2.0**-24
    product = 2 * (D + 2) * ulp * pixel * longest  # in any order of summation
    after = 2 * 16 * ulp * (2.0**31 + pixel * longest)  # a score as fp32, its factor, four of them mixed
    bias = 2 * (4 * ulp * 2.0**29 + 1 + 20 * ulp * 2.0**31) * biased  # as a code; whole, in full precision's sums
    return pixel * off + product + after + bias


def farthest_pair(points: Tensor) -> float:
    """(P, D) float64 -> no less than the largest distance of two; of many points a looser bound, twice the longest."""
    squares = points.square().sum(1)
    longest = float(squares.amax())
    if len(points) > PAIRED:
        return 2 * math.sqrt(longest)
    most = max(
        float((squares[i : i + 512, None] + squares - 2 * (points[i : i + 512] @ points.T)).amax())
        for i in range(0, len(points), 512)
    )
    return math.sqrt(most + 1e-11 * longest)


def _deepest(table: Table) -> list[int]:
    """Prototypes of the class that has most, of every `lanes()` classes in the table's order."""
    counts = [k for _, classes, k in table.groups for _ in range(classes)]
    return [max(counts[b : b + lanes()]) for b in range(0, len(counts), lanes())]


def takes(screen: Screen, rows: Tensor) -> bool:
    return rows.dtype == torch.float32 and native.takes(rows) and screen.codes.shape[2] == lanes()


def certain_labels(rows: Tensor, screen: Screen, scores: Tensor | None = None, error: Tensor | None = None) -> Tensor:
    """(n, D) -> (n,) the class of the nearest prototype, or -1 where the codes do not tell.

    Args:
        scores: (n, C), filled with the class maxima of p . x + bias less what all prototypes share.
        error: (n,), filled with how far the difference of two scores of a pixel may be from the true one.
    """
    labels = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    native.call(
        _library(), "screen", rows.contiguous(), *rows.shape, screen.codes, screen.bias, screen.block,
        len(screen.block), screen.classes, screen.num_classes, screen.worth, LENGTH, LARGEST, screen.largest_bias,
        screen.spread, screen.own, labels, scores, error, torch.get_num_threads(),
    )  # fmt: skip
    return labels
