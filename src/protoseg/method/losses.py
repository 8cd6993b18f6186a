"""Eq. (2), (5), (6), (7): cross-entropy over classes, pixel-prototype contrast and distance, their weighted sum.

Every mean is over the labelled pixels of ALL ranks: each rank holds world_size * (its sum) / (global count), because
data-parallel training averages gradients over ranks. Without a labelled pixel a loss is 0 with zero gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.method import ranks
from protoseg.method.clustering import Reduction
from protoseg.method.presets import whole
from protoseg.method.resizing import bilinear, bilinear_adjoint

VOID = 255  # the usual label of pixels that have none


class Errors(NamedTuple):
    """What the classes still got wrong in one batch (`label_errors`), as far as its prototypes were known before the
    clustering: all but which prototype a pixel's own error goes to.

    Attributes:
        taken: (C*K, D) of each prototype the sum of the unit embeddings of pixels of other classes, or of none, whose
            nearest of its class it is, each times the error of the class, which is negative but at borders.
        lacking: (N,) error of each pixel's own class, 0 where it has none.
    """

    taken: Tensor
    lacking: Tensor


@dataclass
class Losses:
    """What one pass over a batch gives; `head.update` takes it to move the prototypes.

    Attributes:
        total: () the weighted sum, Eq. (7), to call `backward` on.
        ce, ppc, ppd: () the unweighted parts of Eq. (2), (5), (6).
        assignment: (B, h, w) int64 prototype c*K + k each pixel was given, -1 where unlabelled; None without
            prototypes.
        embedding: (N, D) detached unit embeddings, rows (b h w).
        moving: (N,) int64 prototype each pixel moves, -1 for none; the same as `assignment` but for options that
            update from a draw or from correct pixels only.
        parts: name -> detached () tensor, for logs.
        errors: where the update wants them.
    """

    total: Tensor
    ce: Tensor
    ppc: Tensor
    ppd: Tensor
    assignment: Tensor | None = None
    embedding: Tensor | None = None
    moving: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)
    errors: Errors | None = None

    @classmethod
    def cross_entropy_only(cls, ce: Tensor) -> Losses:
        """The losses of a parametric head."""
        zero = torch.zeros_like(ce.detach())
        return cls(total=ce, ce=ce, ppc=zero, ppd=zero, parts={"ce": ce.detach(), "loss": ce.detach()})


def check_features(features: Tensor, channels: int) -> tuple[int, int, int]:
    """B, h, w of (B, channels, h, w) features.

    Raises:
        ValueError: features of another shape.
    """
    if features.dim() != 4 or features.shape[1] != channels:
        raise ValueError(f"features must be (B, {channels}, h, w), given {tuple(features.shape)}")
    return features.shape[0], features.shape[2], features.shape[3]


def check_labels(labels: Tensor, batch: int, num_classes: int, ignore_index: int) -> None:
    """Refuse labels no loss can be taken of.

    Raises:
        ValueError: they are not (batch, H, W) int64 or, checked on the CPU only, out of range.
    """
    if labels.dim() != 3 or labels.shape[0] != batch:
        raise ValueError(
            f"labels must be ({batch}, H, W): (B, H, W) with B = {batch} as the features, given {tuple(labels.shape)}"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, given {labels.dtype}; call labels.long()")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would stop the device
        bad = labels[((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)]
        if bad.numel():
            raise ValueError(
                f"labels hold {int(bad[0])} ({bad.numel()} pixels out of range), but the head has "
                f"{num_classes} classes; set num_classes or ignore_index (now {ignore_index})"
            )


def weights_of_classes(weights: Sequence[float] | None, num_classes: int) -> Tensor | None:
    """(C,) fp32 weights of the cross-entropy, on the device that modules are made on, or None for none.

    Raises:
        ValueError: not C of them, or one that is no weight.
    """
    if weights is None:
        return None
    tensor = torch.as_tensor(weights, dtype=torch.float32, device="cpu")  # looked at even where modules have no values
    if tensor.shape != (num_classes,):
        raise ValueError(f"class_weights needs {num_classes} numbers, given {tensor.numel()}")
    if not bool(((tensor >= 0) & tensor.isfinite()).all()):
        raise ValueError(f"class_weights must be finite and not negative, given {tensor.tolist()}")
    return torch.empty(num_classes, dtype=torch.float32).copy_(tensor)


def void_label(ignore_index: int | None, num_classes: int) -> int:
    """The label of pixels that have none: 255 unless given.

    Raises:
        TypeError: no whole number.
        ValueError: none given, and 255 is one of the classes.
    """
    if ignore_index is None and num_classes > VOID:
        raise ValueError(f"{VOID} is one of {num_classes} classes, so ignore_index must be given; -100 is never one")
    return VOID if ignore_index is None else whole("ignore_index", ignore_index)


def ranks_share(total: Reduction) -> float:
    """What a rank's sum is multiplied by before data-parallel training averages over ranks."""
    return 1.0 if total is not ranks.total else float(ranks.world_size())


def labelled_count(labelled: Tensor, dtype: torch.dtype, total: Reduction = ranks.total) -> Tensor:
    """How many of the (N,) pixels are labelled, over all ranks; at least 1. () tensor."""
    return total(labelled.sum(dtype=dtype)).clamp(min=1)


def label_mass(labels: Tensor, ignore_index: int, class_weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sum of the class weights of the labelled pixels of this rank, their number without weights. ()."""
    labelled = labels != ignore_index
    if class_weights is None:
        return labelled.sum(dtype=dtype)
    return (labelled.to(dtype) * class_weights.to(dtype)[torch.where(labelled, labels, 0)]).sum()


def labelled_mass(
    labels: Tensor, ignore_index: int, class_weights: Tensor | None, dtype: torch.dtype, total: Reduction = ranks.total
) -> Tensor:
    """`label_mass` over all ranks; 1 for none."""
    mass = total(label_mass(labels, ignore_index, class_weights, dtype))
    return torch.where(mass > 0, mass, 1)


def shares(sums: Tensor, total: Reduction = ranks.total) -> Tensor:
    """What makes means of sums over pixels: the inverse of `sums` over all ranks, 1 where that is 0, times
    `ranks_share`; in one message for all of them."""
    inverse = total(sums).reciprocal().nan_to_num_(posinf=1.0)
    return inverse if ranks_share(total) == 1 else inverse * ranks_share(total)


def mean_over_labelled(values: Tensor, labelled: Tensor, total: Reduction = ranks.total) -> Tensor:
    """Mean of (N,) `values` where (N,) `labelled` is true, over all ranks; 0 where there is none. () tensor."""
    count = labelled_count(labelled, values.dtype, total)
    return ranks_share(total) * torch.where(labelled, values, 0).sum() / count


def segmentation_cross_entropy(
    scores: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    class_weights: Tensor | None = None,
    align_corners: bool = False,
    total: Reduction = ranks.total,
) -> Tensor:
    """Eq. (2): cross-entropy of class scores at label resolution, mean over labelled pixels.

    Args:
        scores: (B, C, h, w), brought to label size bilinearly.
        labels: (B, H, W) int64; `ignore_index` is void.
        class_weights: (C,); the mean is then weighted by them.

    Returns:
        () scalar; 0 with zero gradient where nothing is labelled.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = bilinear(scores, (labels.shape[-2], labels.shape[-1]), align_corners=align_corners)
    weights = None if class_weights is None else class_weights.to(scores.dtype)
    summed = F.cross_entropy(scores, labels, weight=weights, ignore_index=ignore_index, reduction="sum")
    return ranks_share(total) * summed / labelled_mass(labels, ignore_index, class_weights, scores.dtype, total)


@torch.no_grad()
def label_errors(
    scores: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    class_weights: Tensor | None = None,
    align_corners: bool = False,
) -> Tensor:
    """What the classes still get wrong, w_y (1[y = c] - P(c)) of every label, at feature size.

    The errors of the labels go back the way the scores came, by the adjoint of the bilinear resize: this is minus the
    gradient of `segmentation_cross_entropy` to the scores, in units of one feature pixel. With labels at feature size
    it is 1[y = c] - P(c) of the pixel itself; otherwise a pixel on a border holds what both classes want of it.

    Args:
        scores: (B, C, h, w). labels: (B, H, W), `ignore_index` counts for nothing.
        class_weights: (C,) w; None: 1.

    Returns:
        (N, C) rows (b h w).
    """
    (_, C, h, w), size = scores.shape, (labels.shape[1], labels.shape[2])
    scores = bilinear(scores, size, align_corners=align_corners)
    valid = labels != ignore_index
    target = labels.masked_fill(~valid, 0)
    errors, own = scores.softmax(1), target[:, None]
    errors.scatter_(1, own, 0)
    lacking = errors.sum(1, keepdim=True)  # not 1 - P, of which rounding leaves nothing, or anything, where P is near 1
    errors.neg_().scatter_(1, own, lacking)
    weights = valid.to(errors.dtype) if class_weights is None else valid * class_weights.to(errors.dtype)[target]
    errors *= weights[:, None]
    errors = bilinear_adjoint(errors, (h, w), align_corners=align_corners)
    errors *= (h * w) / (size[0] * size[1])
    return errors.permute(0, 2, 3, 1).reshape(-1, C)


def draw_negatives(count: int, number: int, device: torch.device) -> Tensor:
    """(number,) different prototypes out of [0, count), every set equally likely: drawn by torch's generator of the
    first rank and the same on every rank, which must all call it."""
    drawn = torch.randperm(count, device=device)[:number]
    return ranks.from_first(drawn)


def pixel_prototype_contrast(
    similarity: Tensor,
    target: Tensor,
    *,
    temperature: float = 0.1,
    siblings: bool = True,
    num_prototypes: int = 1,
    negatives: Tensor | None = None,
    total: Reduction = ranks.total,
) -> Tensor:
    """Eq. (5), PPC: a pixel is nearer to its prototype than to all others, mean of -log softmax(x . p / tau)[target].

    With `negatives` the other classes' part of the softmax's sum is estimated from M drawn prototypes (the estimate of
    Horvitz and Thompson): own class + C*K/M * sum over the drawn ones of other classes of exp(x . p / tau). Each
    prototype is drawn with probability M / (C*K), so the sum is right in expectation, and exact with M = C*K. The loss
    is its logarithm, which is concave: on average it is too small, by about Var(sum) / (2 sum^2), which falls to 0 as
    M grows; the gradient has a bias of the same order.

    Args:
        similarity: (N, C*K) cosine of every pixel with every prototype.
        target: (N,) the prototype a pixel was given, in [0, C*K), or -1.
        temperature: tau (paper: 0.1).
        siblings: whether the other prototypes of the pixel's own class are negatives, as in the paper.
        num_prototypes: K, needed where `siblings` is false or with `negatives`.
        negatives: (M,) prototypes from `draw_negatives`; None: all.
    """
    logits = similarity / temperature
    if negatives is not None:
        return _sampled_contrast(logits, target, siblings, num_prototypes, negatives, total)
    labelled = target >= 0
    index = target.clamp(min=0)[:, None]  # N 1
    positive = logits.gather(1, index)  # N 1
    if not siblings:
        owner = torch.arange(logits.shape[1], device=logits.device) // num_prototypes  # CK
        rivals = owner[None] == index // num_prototypes  # N CK, the whole own class
        logits = logits.masked_fill(rivals, -torch.inf)
        logits = torch.cat([logits, positive], 1)
    return mean_over_labelled(logits.logsumexp(1) - positive.squeeze(1), labelled, total)


def _sampled_contrast(
    logits: Tensor, target: Tensor, siblings: bool, num_prototypes: int, negatives: Tensor, total: Reduction
) -> Tensor:
    labelled = target >= 0
    index = target.clamp(min=0)[:, None]  # N 1
    positive = logits.gather(1, index)  # N 1
    owner = index // num_prototypes  # N 1
    kept = positive
    if siblings:
        kept = logits.gather(1, owner * num_prototypes + torch.arange(num_prototypes, device=logits.device))  # N K
    drawn = logits[:, negatives] + math.log(logits.shape[1] / len(negatives))  # N M
    drawn = drawn.masked_fill((negatives // num_prototypes)[None] == owner, -torch.inf)
    return mean_over_labelled(torch.cat([kept, drawn], 1).logsumexp(1) - positive.squeeze(1), labelled, total)


def pixel_prototype_distance(similarity: Tensor, target: Tensor, *, total: Reduction = ranks.total) -> Tensor:
    """Eq. (6), PPD: draw a pixel to the prototype it was given, mean of (1 - x . p)^2. Arguments as in PPC."""
    own = similarity.gather(1, target.clamp(min=0)[:, None]).squeeze(1)  # N
    return mean_over_labelled((1 - own).square(), target >= 0, total)


def total_loss(ce: Tensor, ppc: Tensor, ppd: Tensor, contrast_weight: float, distance_weight: float) -> Tensor:
    """Eq. (7): L = L_CE + lambda1 L_PPC + lambda2 L_PPD."""
    return ce + contrast_weight * ppc + distance_weight * ppd
