"""Eq. (1), (2), (5), (6), (7) in one pass over the pixels, with the gradient to the features in the same pass.

A band of pixels at a time: cosines with all prototypes (first product), best prototype of each class, cross-entropy and
its gradient, log-sum-exp over all prototypes, and from these the band's gradient (second product). Prototypes carry no
gradient, so these two products are all there is. What the clustering wants, each pixel's cosines with its own
class, is taken out of the band in passing; the prototype it then chooses enters the gradient as one row per pixel,
added afterwards. No table of all pixels by all prototypes, or by all classes, ever exists.

At label resolution a feature row's gradient is complete only when the band below has been seen, so each band of an
image too large for one leaves its last row to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from protoseg.kernels import cosines, gemm, gpu, similarity_cpu, upsampling
from protoseg.kernels.class_errors import Band
from protoseg.kernels.cosines import Cosines
from protoseg.kernels.derivatives import first_only
from protoseg.kernels.shards import Shard

if TYPE_CHECKING:
    from protoseg.kernels.gpu import similarity as gpu_similarity

CPU_BAND = 1_500_000  # cosines of a band: 6 MB in fp32, which stays in a core's share of the last cache
GPU_BAND = 64_000_000
# Below this the products lose more than the cache gives; 1.2 times faster than 128 at C = 10,000. Bands are multiples
# of it, which fill the vectors: MKL took 1.5 times as long for 177 columns of 8,470 prototypes as for 176.
FEWEST_COLUMNS = 64
ROWS = 1024  # of the last loop, over (N, D)

# (N, K) cosines with the own class and (N,) class each pixel scores highest (or None) -> prototype in [0, C*K) that
# each pixel was given for the losses, and the one it moves; -1 for none.
Assign = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def budget_on(device: torch.device) -> int:
    """Numbers that a band's table may have."""
    return CPU_BAND if device.type == "cpu" else GPU_BAND


def band_columns(rows: int, budget: int) -> int:
    """Pixels of a band, whose table has so many rows."""
    return max(FEWEST_COLUMNS, budget // rows // FEWEST_COLUMNS * FEWEST_COLUMNS)


@dataclass(frozen=True)
class Settings:
    """What a head has decided once.

    Attributes:
        size: (B, h, w) of the features.
        temperature: tau of Eq. (5). contrast_weight, distance_weight: lambda1, lambda2 of Eq. (7).
        siblings: whether the other prototypes of the own class are negatives of Eq. (5).
        layer_norm: eps of a LayerNorm over the classes' scores, or None.
        predict: whether `Assign` wants the class of highest score.
        errors: whether the update wants what the classes still get wrong (`losses.Errors`).
        negative_weight: what a drawn negative stands for, where only some are drawn.
        half: whether the features came in half precision, whose digits are all that products on a GPU then keep.
    """

    size: tuple[int, int, int]
    temperature: float
    contrast_weight: float
    distance_weight: float
    siblings: bool
    ignore_index: int
    align_corners: bool
    layer_norm: float | None = None
    predict: bool = False
    errors: bool = False
    negative_weight: float = 1.0
    half: bool = False


@dataclass(frozen=True)
class Batch:
    """One batch and the numbers its means divide by.

    Attributes:
        embedding: (N, D) rows, unit length (or to be brought to it, see `sweep`).
        prototypes: (C, K, D) of the same type.
        log_scale: () log of what a cosine is multiplied by. norm_weight, norm_bias: (C,) of the LayerNorm, or None.
        labels: (B, H, W); classes: (N,) at feature size, -1 for void.
        class_weights: (C,) or None.
        label_share: () factor that makes a sum over labels the cross-entropy; pixel_share: () the same for PPC and PPD.
        negatives: (M,) prototypes through which Eq. (5) sees the other classes, -1 for one that another rank holds;
            None: all of them.
        shard: which classes `prototypes` holds, where other ranks hold the rest; labels, classes and class weights are
            then those of all classes, targets those of this rank. None: all of them.
    """

    embedding: Tensor
    prototypes: Tensor
    log_scale: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    labels: Tensor
    classes: Tensor
    class_weights: Tensor | None
    label_share: Tensor
    pixel_share: Tensor
    settings: Settings
    negatives: Tensor | None = None
    shard: Shard | None = None


@dataclass
class Swept:
    """What one sweep gives. `gradient` (N, D) lacks the targets' term; the last five are None unless asked for."""

    ce: list[Tensor]  # parts of the sum over labels, as vectors
    log_sum: Tensor  # (N,) log-sum-exp of cosine / tau; without siblings over what Eq. (5) then leaves
    own: Tensor  # (N, K)
    predicted: Tensor | None  # (N,)
    gradient: Tensor | None
    log_scale: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    errors: tuple[Tensor, Tensor] | None  # (C*K, D) and (N,) of `losses.Errors`


def sweep(
    batch: Batch,
    ce_weight: Tensor | float,
    ppc_weight: Tensor | float,
    *,
    gradient: bool,
    parameters: bool,
    raw: Tensor | None = None,
    target: Tensor | None = None,
    only_own: bool = False,
    errors: bool = False,
) -> Swept:
    """The pass over all bands.

    Args:
        ce_weight, ppc_weight: what the gradients of the two losses are multiplied by.
        gradient, parameters: whether the gradient to the embedding, and to scale and LayerNorm, is wanted.
        raw: (N, D) embedding before unit length; then `batch.embedding` is filled here.
        target: (N,) in [0, C*K) or -1; wanted beforehand only without siblings.
        only_own: fill `own` and `predicted` and leave the losses.
        errors: whether those of the labels are wanted; `ce_weight` is then 1.
    """
    made = _Sweep(batch, ce_weight, ppc_weight, raw, target, gradient=gradient, parameters=parameters, errors=errors)
    if only_own:
        made.look_only()
    elif not made.resized:
        made.at_feature_size()
    elif made.whole:
        made.at_label_size()
    else:
        made.by_strips()
    return made.ended()


@dataclass(frozen=True)
class _Look:
    """What was seen of pixels [start, end) of the batch.

    Attributes:
        best: (C, n) cosine with the nearest prototype of every class. kept: what the gradient wants, pixels last.
    """

    start: int
    end: int
    best: Tensor
    kept: list[Tensor]

    def __getitem__(self, pixels: slice) -> _Look:
        first, last, _ = pixels.indices(self.end - self.start)
        kept = [table[:, first:last] for table in self.kept]
        return _Look(self.start + first, self.start + last, self.best[:, first:last], kept)


class _Sweep:
    """One sweep: what is read of the batch once, the bands, and what they leave.

    Attributes:
        resized: whether labels have a size of their own. labels: (B, H, W); at feature size (1, N, 1), since any run of
            pixels is a band there: one image, a pixel a row.
        fused: whether the cross-entropy has kernels of its own, of images that are `whole` in their band.
        scaled: they then take cosines for scores and give the gradient to them, in their place: not where drawn
            negatives want the cosines afterwards.
    """

    def __init__(
        self,
        batch: Batch,
        ce_weight: Tensor | float,
        ppc_weight: Tensor | float,
        raw: Tensor | None,
        target: Tensor | None,
        *,
        gradient: bool,
        parameters: bool,
        errors: bool,
    ):
        s, shard = batch.settings, batch.shard
        C, K, D = batch.prototypes.shape
        N, new = len(batch.embedding), batch.embedding.new_empty
        self.batch, self.raw, self.parameters = batch, raw, parameters
        self.labels, self.size, self.resized = batch.labels, s.size, batch.labels.shape[1:] != s.size[1:]
        if not self.resized:
            self.labels, self.size = batch.labels.reshape(1, N, 1), (1, N, 1)
        self.scale = batch.log_scale.exp().to(batch.embedding.dtype)
        self.asked = s.ignore_index, batch.class_weights, _times(*_factors(batch.label_share, ce_weight))
        self.classes = batch.classes if shard is None else shard.local(batch.classes)
        self.cosines = _cosines(batch, self.classes, target)
        self.cosines.push(*_factors(batch.pixel_share, ppc_weight))
        self.budget = budget_on(batch.embedding.device)
        columns = band_columns((C if shard is None else shard.widest) * (K if self.cosines.tabled else 1), self.budget)
        self.bands = _bands(*self.size, columns)
        self.fused = shard is None and gpu.way(batch.embedding.device, batch.embedding.dtype) is not None
        self.whole = self.fused and self.size[1] * self.size[2] <= columns
        plain_scores = s.layer_norm is None and batch.negatives is None
        self.scaled = self.fused and (self.whole or not self.resized) and plain_scores
        self.slopes: list[Tensor] = []  # parts of the gradient to the log of the scale, as vectors
        normed = parameters and s.layer_norm is not None
        self.swept = Swept(
            ce=[],
            log_sum=self.cosines.log_sum,
            own=self.cosines.own.T,
            predicted=batch.classes.new_empty(N) if s.predict else None,
            gradient=new(N, D) if gradient else None,
            log_scale=None,
            norm_weight=new(C).zero_() if normed else None,
            norm_bias=new(C).zero_() if normed else None,
            errors=(new(C * K, D).zero_(), new(N).zero_()) if errors else None,
        )

    def look_only(self) -> None:
        """Own cosines, and classes of highest score."""
        for band in self.bands:
            self._look(*band, losses=False)

    def at_feature_size(self) -> None:
        for band in self.bands:
            look, scores = self._look(*band)
            labels = self.labels[0, look.start : look.end, 0]
            if self.fused:
                from protoseg.kernels.gpu import cross_entropy

                loss, slope = cross_entropy.cross_entropy_(scores, labels, *self.asked, self._scale_of_cosines)
                self.slopes.append(slope)
            else:
                loss = upsampling.cross_entropy_(scores, labels, *self.asked, self.batch.shard)[None]
            self.swept.ce.append(loss)
            self._complete(look, scores)
            del look, scores  # or the next band's table would come beside this one's

    def at_label_size(self) -> None:
        """Images that are whole in their band, by the cross-entropy's kernels."""
        from protoseg.kernels.gpu import cross_entropy

        size, corners = self.size[1:], self.batch.settings.align_corners
        for images, rows in self.bands:
            look, scores = self._look(images, rows)
            labels = self.labels[images.start : images.stop]
            loss, slope, gradient = cross_entropy.label_cross_entropy(
                scores, size, labels, corners, *self.asked, self._scale_of_cosines
            )
            self.swept.ce.append(loss)
            self.slopes.append(slope)
            self._complete(look, gradient)
            del look, scores, gradient

    def by_strips(self) -> None:
        """Labels of any size: a band leaves its last row, which still gets gradient from below, to the next one."""
        (_, h, w), (height, width), C = self.size, self.labels.shape[1:], len(self.batch.prototypes)
        kind = (self.batch.settings.align_corners, self.batch.embedding.dtype, self.batch.embedding.device)
        vertical, across = upsampling.lines(h, height, *kind), upsampling.lines(w, width, *kind)
        carried: tuple[_Look, Tensor, Tensor] | None = None  # that row, its widened scores, their gradient so far
        done = 0  # label rows of this image
        for images, rows in self.bands:
            look, scores = self._look(images, rows)
            if rows.start == 0:
                carried, done = None, 0
            widened = upsampling.widen(scores.view(-1, w), across).view(C * len(images), len(rows), width)
            gradient = torch.zeros_like(widened)
            top, above = rows.start, carried
            if above is not None:
                widened, gradient = torch.cat([above[1], widened], 1), torch.cat([above[2], gradient], 1)
                top -= 1
            ready = vertical.ready(rows.stop)
            loss = upsampling.strip_cross_entropy(
                widened, gradient, vertical, (done, ready), top, self.labels[images.start : images.stop], *self.asked,
                self.budget, self.batch.shard,
            )  # fmt: skip
            self.swept.ce.append(loss[None])
            done = ready
            if rows.stop < h:
                carried = look[-w:], widened[:, -1:], gradient[:, -1:]
                look, gradient = look[:-w], gradient[:, :-1]
            narrowed = upsampling.narrow(gradient.reshape(-1, width), across).view(C, -1)
            if above is not None:
                self._complete(above[0], narrowed[:, :w])
                narrowed = narrowed[:, w:]
            if look.end > look.start:
                self._complete(look, narrowed)

    def ended(self) -> Swept:
        swept, share = self.swept, self.batch.label_share
        if self.parameters:
            swept.log_scale = _joined(self.slopes).sum() if self.slopes else torch.zeros_like(self.scale)
        if swept.errors is not None:  # from minus the gradient of a mean to units of a pixel
            (_, h, w), (height, width) = self.size, self.labels.shape[1:]
            unit = -(h * w) / max(height * width, 1) / (share * self.scale if self.scaled else share)
            for part in swept.errors:
                part.mul_(unit)
        return swept

    @property
    def _scale_of_cosines(self) -> Tensor | None:
        return self.scale if self.scaled else None

    def _look(self, images: range, rows: range, *, losses: bool = True) -> tuple[_Look, Tensor]:
        """A band's cosines, and its (C, n) class scores, which may be overwritten."""
        (_, h, w), swept, shard = self.size, self.swept, self.batch.shard
        start = images.start * h * w + rows.start * w
        end = (images.stop - 1) * h * w + rows.stop * w
        self.cosines.fill(self.raw, start, end)
        best, kept = self.cosines.nearest(start, end, losses=losses)
        scores = best if self.scaled else _scores(self.batch, self.scale, best)
        if swept.predicted is not None:
            swept.predicted[start:end] = scores.argmax(0) if shard is None else shard.argmax(scores)
        return _Look(start, end, best, kept), scores

    def _complete(self, look: _Look, scores_gradient: Tensor) -> None:
        """Errors and gradient of pixels whose cross-entropy is complete; overwrites its (C, n) gradient to scores."""
        swept, pixels, gradient = self.swept, (look.start, look.end), scores_gradient
        part = slice(*pixels)
        if swept.errors is not None:
            taken, lacking = swept.errors
            self.cosines.errors(Band(gradient, self.classes[part], taken, lacking[part]), look.kept, *pixels)
        if not self.scaled:
            gradient = _scores_backward(self.batch, self.scale, look.best, gradient, swept)
            if self.parameters:
                self.slopes.append(torch.dot(gradient.flatten(), look.best.flatten())[None])
        if swept.gradient is not None:
            self.cosines.gradient(gradient, look.kept, *pixels, swept.gradient[part])


class OnePass(torch.autograd.Function):
    """(N, D) raw embedding, (C, K, D) prototypes -> total, CE, PPC, PPD, unit embedding, assignment, moving, the two of
    `losses.Errors` or None.

    The gradient of the total is made in the forward pass. A gradient asked of CE, PPC or PPD by themselves, or a second
    time, is made when it is asked for, at the price of another pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        raw: Tensor,
        log_scale: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        prototypes: Tensor,
        labels: Tensor,
        classes: Tensor,
        class_weights: Tensor | None,
        label_share: Tensor,
        pixel_share: Tensor,
        negatives: Tensor | None,
        settings: Settings,
        shard: Shard | None,
        assign: Assign,
    ) -> tuple[Tensor | None, ...]:
        raw = raw.detach()
        s = settings
        batch = Batch(
            torch.empty_like(raw, memory_format=torch.contiguous_format), prototypes.to(raw.dtype), log_scale.detach(),
            norm_weight, norm_bias, labels, classes,
            None if class_weights is None else class_weights.to(raw.dtype),
            label_share, pixel_share, s, negatives, shard,
        )  # fmt: skip
        needed = {"gradient": ctx.needs_input_grad[0], "parameters": any(ctx.needs_input_grad[1:4])}
        weights = (1.0, s.contrast_weight)
        if s.siblings:
            swept = sweep(batch, *weights, raw=raw, errors=s.errors, **needed)
            target, moving = assign(swept.own, swept.predicted)
        else:  # which prototypes repel a pixel depends on the one it was given, so that comes first
            first = sweep(batch, 0.0, 0.0, raw=raw, gradient=False, parameters=False, only_own=True)
            target, moving = assign(first.own, first.predicted)
            swept = sweep(batch, *weights, target=target, errors=s.errors, **needed)
        near, (total, ce, ppc, ppd) = _given(batch, swept, target)
        if swept.gradient is not None:
            _targets_and_length(swept.gradient, batch, raw, target, near, s.contrast_weight, s.distance_weight)
        ctx.set_materialize_grads(False)
        kept = (batch.embedding, target, moving, *(swept.errors or (None, None)))
        ctx.mark_non_differentiable(*(t for t in kept if t is not None))
        ctx.save_for_backward(
            prototypes, raw, batch.embedding, log_scale, norm_weight, norm_bias, target, near, labels, classes,
            class_weights, label_share, pixel_share, negatives,
        )  # fmt: skip
        ctx.settings, ctx.shard = settings, shard
        ctx.made = swept if any(ctx.needs_input_grad) else None  # given away by the first backward
        return total, ce, ppc, ppd, *kept

    @staticmethod
    @first_only
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        total, ce, ppc, ppd = gradients[:4]
        saved = ctx.saved_tensors  # refuses, as autograd does, when a prototype has moved in between
        if all(g is None for g in (total, ce, ppc, ppd)):
            return (None,) * 14
        made, ctx.made = ctx.made, None
        if made is not None and total is not None and ce is None and ppc is None and ppd is None:
            swept = made
            if swept.gradient is not None:
                swept.gradient.mul_(total)
            parameters = [
                None if p is None else p * total for p in (swept.log_scale, swept.norm_weight, swept.norm_bias)
            ]
        else:
            prototypes, raw, embedding, log_scale, norm_weight, norm_bias, target, near, *rest = saved
            s = ctx.settings
            labels, classes, class_weights, label_share, pixel_share, negatives = rest
            batch = Batch(
                embedding, prototypes.to(raw.dtype), log_scale, norm_weight, norm_bias, labels, classes,
                None if class_weights is None else class_weights.to(raw.dtype), label_share, pixel_share, s,
                negatives, ctx.shard,
            )  # fmt: skip
            none = label_share.new_zeros(())
            total = none if total is None else total
            weights = [
                total * factor + (none if g is None else g)
                for g, factor in ((ce, 1.0), (ppc, s.contrast_weight), (ppd, s.distance_weight))
            ]
            swept = sweep(
                batch, weights[0], weights[1], target=target,
                gradient=ctx.needs_input_grad[0], parameters=any(ctx.needs_input_grad[1:4]),
            )  # fmt: skip
            if swept.gradient is not None:
                _targets_and_length(swept.gradient, batch, raw, target, near, *weights[1:])
            parameters = [swept.log_scale, swept.norm_weight, swept.norm_bias]
        wanted = [g if need else None for g, need in zip([swept.gradient, *parameters], ctx.needs_input_grad)]
        if wanted[1] is not None:
            wanted[1] = wanted[1].to(saved[3].dtype)
        return (*wanted, *(None,) * 10)


def one_pass(batch: Batch, assign: Assign) -> tuple[Any, ...]:
    """`OnePass` of a batch whose embedding is not yet of unit length."""
    learned = [batch.embedding, batch.log_scale, batch.norm_weight, batch.norm_bias]
    if not torch.is_grad_enabled():  # a Function hears of a parameter's wish even where nobody records
        learned = [None if t is None else t.detach() for t in learned]
    return OnePass.apply(
        *learned, batch.prototypes, batch.labels,
        batch.classes, batch.class_weights, batch.label_share, batch.pixel_share, batch.negatives, batch.settings,
        batch.shard, assign,
    )  # fmt: skip


def class_cosines(raw: Tensor, prototypes: Tensor, *, half: bool = False) -> Tensor:
    """Eq. (1) without gradient: cosine of every pixel with the nearest prototype of every class, a band at a time.

    Args:
        raw: (N, D) embedding, of any length.
        prototypes: (C, K, D) unit vectors of the same type.
        half: see `Settings`.

    Returns:
        (N, C), classes first in memory.
    """
    C, K, D = prototypes.shape
    flat = prototypes.flatten(0, 1)
    best = raw.new_empty(C, len(raw))
    step = band_columns(C * K, budget_on(raw.device))
    unit = raw.new_empty(min(step, len(raw)), D)
    unit_rows = similarity_cpu.unit_rows if similarity_cpu.takes(unit) else cosines.unit_rows
    way = gpu.way(raw.device, raw.dtype, half=half)
    for start in range(0, len(raw), step):
        part = raw[start : start + step]
        unit_rows(part, unit[: len(part)])
        if way is not None:
            from protoseg.kernels.gpu.similarity import best_of_each_class

            best[:, start : start + step] = best_of_each_class(way, unit[: len(part)], prototypes)
            continue
        table = gemm.similarities(flat, unit[: len(part)])
        torch.amax(table.view(C, K, -1), 1, out=best[:, start : start + step])
    return best.T


def _cosines(batch: Batch, classes: Tensor, target: Tensor | None) -> gpu_similarity.Cosines | Cosines:
    """What sees the cosines of one sweep: the fused kernels, Triton's or C's, where they are at hand and know what is
    asked, or PyTorch's lines.

    Args:
        classes: (N,) those of the batch, -1 for void or another rank's.
    """
    s = batch.settings
    siblings = s.siblings or target is None
    known = (batch.embedding, batch.prototypes, classes, target, s.temperature, siblings)
    way = gpu.way(batch.embedding.device, batch.embedding.dtype, half=s.half)
    if way is not None and batch.shard is None and batch.negatives is None:
        from protoseg.kernels.gpu import similarity as gpu_similarity

        return gpu_similarity.Cosines(way, *known)
    lines = similarity_cpu.Cosines if similarity_cpu.takes(batch.embedding, batch.prototypes) else Cosines
    return lines(*known, batch.classes >= 0, batch.shard, batch.negatives, s.negative_weight)


def _given(batch: Batch, swept: Swept, target: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(N,) cosine of each pixel with the prototype it was given; total, CE, PPC and PPD, () each."""
    s = batch.settings
    entropy = _joined(swept.ce) if swept.ce else swept.log_sum[:0]
    if gpu.way(target.device, swept.own.dtype) is not None:
        from protoseg.kernels.gpu import rows

        near, parts = rows.given(swept.own, swept.log_sum, target, s.temperature)
        if batch.shard is None:
            shares = (batch.label_share, batch.pixel_share)
            return near, rows.totals(entropy, parts, *shares, s.contrast_weight, s.distance_weight)
        sums = parts.sum(1)
    else:
        labelled = target >= 0
        near = swept.own.gather(1, (target % swept.own.shape[1])[:, None])[:, 0]
        ppc = torch.where(labelled, swept.log_sum - near / s.temperature, 0).sum()
        sums = torch.stack([ppc, torch.where(labelled, (1 - near).square(), 0).sum()])
    if batch.shard is not None:  # a pixel's target is on one rank
        sums = batch.shard.total(sums)
    ce = entropy.sum() * batch.label_share
    ppc, ppd = sums[0] * batch.pixel_share, sums[1] * batch.pixel_share
    return near, (ce.add(ppc, alpha=s.contrast_weight).add_(ppd, alpha=s.distance_weight), ce, ppc, ppd)


def _factors(share: Tensor, weight: Tensor | float) -> tuple[Tensor, float]:
    """Their product as a () tensor and a number: a weight that is one costs no operation."""
    return (share, weight) if isinstance(weight, float) else (share * weight, 1.0)


def _times(share: Tensor, factor: float) -> Tensor:
    return share if factor == 1 else share * factor


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _bands(images: int, h: int, w: int, columns: int) -> list[tuple[range, range]]:
    """(images, rows) of each band: several whole images, or some rows of one."""
    if images * h * w == 0:
        return []
    if h * w <= columns:
        step = columns // (h * w)
        return [(range(i, min(i + step, images)), range(h)) for i in range(0, images, step)]
    step = max(1, columns // w)
    return [(range(i, i + 1), range(r, min(r + step, h))) for i in range(images) for r in range(0, h, step)]


def _scores(batch: Batch, scale: Tensor, best: Tensor) -> Tensor:
    """(C, n) cosines of the best prototypes -> a new tensor of class scores."""
    scores = best * scale
    if batch.settings.layer_norm is None:
        return scores
    eps = batch.settings.layer_norm
    rows = torch.nn.functional.layer_norm(
        scores.T, scores.shape[:1], _cast(batch.norm_weight, best), _cast(batch.norm_bias, best), eps
    )
    return rows.T.contiguous()


def _scores_backward(batch: Batch, scale: Tensor, best: Tensor, gradient: Tensor, swept: Swept) -> Tensor:
    """The adjoint of `_scores`, (C, n), in place of what it is given; adds that of the LayerNorm to `swept`."""
    if batch.settings.layer_norm is not None:
        rows, shape = (best * scale).T.contiguous(), best.shape[:1]
        weight, bias = _cast(batch.norm_weight, best), _cast(batch.norm_bias, best)
        _, mean, rstd = torch.native_layer_norm(rows, shape, weight, bias, batch.settings.layer_norm)
        wanted = [True, swept.norm_weight is not None, swept.norm_weight is not None]
        gradient, to_weight, to_bias = torch.ops.aten.native_layer_norm_backward(
            gradient.T.contiguous(), rows, shape, mean, rstd, weight, bias, wanted
        )
        gradient = gradient.T.contiguous()
        if swept.norm_weight is not None and swept.norm_bias is not None:
            swept.norm_weight += to_weight
            swept.norm_bias += to_bias
    return gradient.mul_(scale)


def _targets_and_length(
    gradient: Tensor,
    batch: Batch,
    raw: Tensor,
    target: Tensor,
    near: Tensor,
    ppc_weight: Tensor | float,
    ppd_weight: Tensor | float,
) -> None:
    """In place: add the pull of each pixel's own target, then go back through the unit length."""
    known = (gradient, batch.embedding, raw, batch.prototypes.flatten(0, 1), target, near)
    contrast, factor = _factors(batch.pixel_share, ppc_weight)
    shares = (contrast, factor / batch.settings.temperature), _factors(batch.pixel_share, ppd_weight)
    if gpu.way(raw.device, raw.dtype) is not None:
        from protoseg.kernels.gpu import rows

        rows.finish(*known, *shares)
        return
    contrast_share, ppd_share = (_times(*share) for share in shares)
    flat = known[3]
    if similarity_cpu.takes(gradient, batch.embedding, flat):
        similarity_cpu.finish(*known, contrast_share, ppd_share)
        return
    pull = -contrast_share - 2 * ppd_share * (1 - near)  # N
    pull = torch.where(target >= 0, pull, 0)[:, None]
    index = target.clamp(min=0)
    step = ROWS if raw.device.type == "cpu" else len(raw)
    for start in range(0, len(raw), max(step, 1)):
        part = slice(start, start + step)
        g, x = gradient[part], batch.embedding[part]
        g.addcmul_(flat[index[part]], pull[part])
        length = torch.linalg.vector_norm(raw[part], dim=1, keepdim=True)
        g.addcmul_(x, (g * x).sum(1, keepdim=True), value=-1).div_(length).masked_fill_(length <= 1e-12, 0)


def _cast(values: Tensor | None, like: Tensor) -> Tensor | None:
    return None if values is None else values.to(like.dtype)
