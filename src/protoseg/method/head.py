"""`PrototypeHead`: the files of this room in the paper's order, for anybody's network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoseg import kernels
from protoseg.kernels.shards import Shard
from protoseg.method import clustering, ranks
from protoseg.method.kmeans import kmeans_assignment
from protoseg.method.losses import (
    Errors,
    Losses,
    check_features,
    check_labels,
    draw_negatives,
    label_errors,
    label_mass,
    pixel_prototype_contrast,
    pixel_prototype_distance,
    segmentation_cross_entropy,
    shares,
    total_loss,
    void_label,
    weights_of_classes,
)
from protoseg.method.presets import count, number, settle
from protoseg.method.prototypes import (
    DEAD_SHARE,
    Memory,
    MomentumRule,
    Start,
    assigned_sums,
    error_sums,
    errors_by_prototype,
    move_,
    note_usage_,
    pairwise_cosine,
    reseed_,
    starting_vectors,
    starting_weight,
)
from protoseg.method.similarity import (
    Distance,
    class_similarity,
    cosine_similarity,
    embed,
    measured,
    own_similarity,
    unit,
)

Projection = Literal["mlp", "linear", "none"]
ASSIGNMENTS = {
    "argmax": clustering.balanced_assignment,
    "nearest": clustering.nearest_assignment,
    "kmeans": kmeans_assignment,
}


def build_projection(in_channels: int, embed_dim: int, kind: Projection = "mlp") -> nn.Module:
    """From features to the embedding: `mlp` is the paper's conv1x1, ReLU, conv1x1; `linear` one conv1x1; or `none`.

    Raises:
        ValueError: `none` with different widths, or an unknown kind.
    """
    if kind == "none":
        if in_channels != embed_dim:
            raise ValueError(
                f'projection="none" keeps the {in_channels} channels of the features, but embed_dim is {embed_dim}'
            )
        return nn.Identity()
    if kind == "linear":
        return nn.Conv2d(in_channels, embed_dim, 1)
    if kind == "mlp":
        return nn.Sequential(
            nn.Conv2d(in_channels, in_channels, 1), nn.ReLU(inplace=True), nn.Conv2d(in_channels, embed_dim, 1)
        )
    raise ValueError(f'projection must be "mlp", "linear" or "none", given {kind!r}')


class PromotedLayerNorm(nn.LayerNorm):
    """LayerNorm in its input's precision: a head in half precision still takes its scores in fp32."""

    def forward(self, values: Tensor) -> Tensor:
        weight, bias = self.weight.to(values.dtype), self.bias.to(values.dtype)
        return F.layer_norm(values, self.normalized_shape, weight, bias, self.eps)


class PrototypeHead(nn.Module):
    """A pixel classifier of K non-learnable prototypes per class (Zhou et al., CVPR 2022).

        head = PrototypeHead(256, num_classes=19)
        scores = head(features)                       # (B, C, h, w)
        losses = head.losses(features, labels)        # .total .ce .ppc .ppd .assignment
        losses.total.backward(); optimizer.step()
        head.update(losses)                           # the only line that moves a prototype

    `prototypes` is a buffer: it travels in `state_dict`, is never a Parameter, and is the same on every rank, so data
    parallel training may run with `broadcast_buffers=False` and needs no `find_unused_parameters`.

    Args:
        in_channels: channels of the features.
        num_classes: C.
        num_prototypes: K per class.
        embed_dim: D; default 256 with a projection (the preset `reference`: as many as `in_channels`).
        projection: `mlp`, `linear` or `none`.
        preset: `default`; `paper` (the same, moved as Eq. (8) says: `update_from="all"`, `momentum=0.999`); `reference`
            (the 2022 code, step for step) or `reference_fixed` (its constants, with the norm over channels and one
            arg-max assignment). Each argument below overrides the preset's value.
        ignore_index: the void label; 255 unless given, and to be given with more than 255 classes.
        class_weights: C numbers, weights of the cross-entropy.
        projection_norm: `channel`, or `width` (the reference's mistake).
        feature_norm: `none`, or `layer_norm` over the D channels before the unit length.
        distance: `cosine`, `euclidean` or `huber`; see `similarity.measured`.
        score_norm: `none`, or `layer_norm` over the C classes (ties 2C learned numbers to the classes).
        score_scale: what a cosine is multiplied by to be a logit; `learn_scale` makes it the head's one learned number.
        assignment: `argmax` of the transport plan, `nearest` prototype, `kmeans` inside the batch, `gumbel` (the
            reference's draw for the update, argmax for the losses), or a function with the signature of
            `clustering.balanced_assignment`.
        update_from: `all` labelled pixels, only those classified `correct`ly, or `errors`: all, each by what its class
            still lacks, and against the classes it wrongly goes to (`prototypes.error_sums`): prototypes that may move
            fast, at the price of a tenth of a step.
        across_ranks: `exact`: sums and counts over all ranks, equal to one process with the whole batch; `average`:
            each rank clusters and moves by itself, then the prototypes are averaged (the reference).
        start: `nested` around near-orthogonal directions of the classes; `random` near-orthogonal vectors; `data`: the
            first pixels of a prototype replace them; `truncated_normal`.
        momentum: mu of Eq. (8). momentum_rule, count_cap: see `prototypes.momentum_step`.
        kappa, sinkhorn_iterations: of Eq. (4); `kmeans` takes the iterations too. small_classes: see
            `clustering.hard_assignment`.
        contrast_temperature: tau of Eq. (5). contrast_weight, distance_weight: lambda1, lambda2 of Eq. (7).
        contrast_siblings: whether the other prototypes of the own class are negatives of Eq. (5).
        contrast_negatives: M, how many prototypes are drawn at each step, the same for all pixels and ranks, for the
            pixels to see the other classes through in Eq. (5); the own class is always there. It is another loss, an
            estimate with a small bias (`losses.pixel_prototype_contrast`), that saves the exponentials of the others;
            the cross-entropy still needs all classes. None: all prototypes.
        reseed_after: steps a prototype may idle (less than a tenth of its share) while its class is seen, before it is
            set on the pixel of its class that is least like its own prototypes; None switches that off.
        align_corners: of the bilinear resize from scores to labels.
        label_sampling: how labels go to feature size.

    A moving average of the model's weights must leave the prototypes out, or bring them back to unit length.

    Raises:
        TypeError: an argument nobody knows, or one that is no number where one is due.
        ValueError: a value that means nothing; names the argument.
    """

    prototypes: Tensor
    weight: Tensor
    length: Tensor
    usage: Tensor
    idle: Tensor
    class_weights: Tensor | None
    _shard: Shard | None = None  # of the classes, in `ShardedPrototypeHead`

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        num_prototypes: int = 10,
        embed_dim: int | None = None,
        projection: Projection = "mlp",
        preset: str = "default",
        ignore_index: int | None = None,
        class_weights: Sequence[float] | None = None,
        count_cap: float = 1000.0,
        **named: Any,
    ):
        super().__init__()
        settings = settle(preset, named)
        if embed_dim is None:
            embed_dim = in_channels if projection == "none" or preset.startswith("reference") else 256
        self.in_channels = in_channels = count("in_channels", in_channels)
        self.num_classes = num_classes = count("num_classes", num_classes)
        self.num_prototypes = num_prototypes = count("num_prototypes", num_prototypes)
        self.embed_dim = embed_dim = count("embed_dim", embed_dim)
        self.ignore_index = void_label(ignore_index, num_classes)
        self.projection_norm: Literal["channel", "width"] = settings["projection_norm"]
        self.distance: Distance = settings["distance"]
        self.update_from: str = settings["update_from"]
        self.across_ranks: str = settings["across_ranks"]
        self.momentum: float = settings["momentum"]
        self.momentum_rule: MomentumRule = settings["momentum_rule"]
        self.count_cap = number("count_cap", count_cap)
        if not self.count_cap > 0:
            raise ValueError(f"count_cap must be positive, given {count_cap}")
        self.kappa: float = settings["kappa"]
        self.sinkhorn_iterations: int = settings["sinkhorn_iterations"]
        self.small_classes: Literal["nearest", "plan"] = settings["small_classes"]
        self.contrast_temperature: float = settings["contrast_temperature"]
        self.contrast_weight: float = settings["contrast_weight"]
        self.contrast_siblings: bool = settings["contrast_siblings"]
        self.contrast_negatives: int | None = settings["contrast_negatives"]
        if self.contrast_negatives is not None and self.contrast_negatives > num_classes * num_prototypes:
            raise ValueError(
                f"contrast_negatives can draw at most the {num_classes} x {num_prototypes} prototypes there are, "
                f"given {self.contrast_negatives}; None takes them all"
            )
        self.distance_weight: float = settings["distance_weight"]
        self.reseed_after: int | None = settings["reseed_after"]
        self.align_corners: bool = settings["align_corners"]
        self.label_sampling: str = settings["label_sampling"]
        self.draws = settings["assignment"] == "gumbel"
        self.assign = settings["assignment"]
        if isinstance(self.assign, str):
            self.assign = clustering.balanced_assignment if self.draws else ASSIGNMENTS[self.assign]
        exact = self.across_ranks == "exact"
        self._total = ranks.total if exact else clustering.alone
        self._largest = ranks.largest if exact else clustering.alone

        self.projection = build_projection(in_channels, embed_dim, projection)
        self.feature_norm = PromotedLayerNorm(embed_dim) if settings["feature_norm"] == "layer_norm" else None
        self.score_norm = PromotedLayerNorm(num_classes) if settings["score_norm"] == "layer_norm" else None
        self.start: Start = settings["start"]
        self._score_scale: float = settings["score_scale"]
        self._class_weights = None if class_weights is None else list(class_weights)
        self.register_buffer("class_weights", None)
        for name, value in self._beginning().items():
            if name == "log_scale" and settings["learn_scale"]:
                self.log_scale = nn.Parameter(value)  # one number, never one per class; the log keeps it positive
            else:
                self.register_buffer(name, value)

    def _beginning(self) -> dict[str, Tensor]:
        """What no layer of the head holds, as it is before the first step."""
        shape = (self.num_classes, self.num_prototypes)
        weight = starting_weight(self.start, self.momentum, self.momentum_rule, self.count_cap)
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        weights = weights_of_classes(self._class_weights, self.num_classes)
        return {
            "log_scale": torch.tensor(math.log(self._score_scale)),
            "prototypes": starting_vectors(*shape, self.embed_dim, self.start),
            "weight": torch.full(shape, weight, dtype=dtype),
            "length": torch.ones(shape, dtype=dtype),
            "usage": torch.full(shape, 1 / self.num_prototypes, dtype=dtype),  # share of the class, moving average
            "idle": torch.zeros(shape, dtype=dtype),  # steps in which the class was seen and this was idle
            **({} if weights is None else {"class_weights": weights}),
        }

    def reset_parameters(self) -> None:
        """Begin anew: draw the prototypes, and put scale, log of use and class weights back; layers have their own.

        For whoever makes modules without their values, as `torch.device("meta")` with `to_empty` does, and
        `from_pretrained` of Hugging Face: call it from `_init_weights`. Every rank draws its own start, so call it
        before DDP, which takes the first rank's.
        """
        self._begin(self._beginning())

    @torch.no_grad()
    def _begin(self, beginning: dict[str, Tensor]) -> None:
        for name, value in beginning.items():
            getattr(self, name).copy_(value)

    def _apply(self, fn: Any, recurse: bool = True) -> PrototypeHead:
        """`half()` and `bfloat16()` are for what learns: the memory stays in fp32 at least. Less would lose steps of
        1 - mu, and counts of thousands."""
        memory = {name: getattr(self, name) for name in Memory._fields}
        super()._apply(fn, recurse)
        for name, before in memory.items():
            now = getattr(self, name)
            dtype = torch.promote_types(now.dtype, torch.float32)
            if now.dtype != dtype:
                setattr(self, name, before.to(now.device, dtype))
        return self

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, num_prototypes={self.num_prototypes}, embed_dim={self.embed_dim}"

    def embed(self, features: Tensor) -> Tensor:
        """(B, D', h, w) features -> (N, D) unit embeddings, rows (b h w), in fp32 at least."""
        return unit(self._embed(features)[0])

    def _embed(self, features: Tensor) -> tuple[Tensor, bool]:
        """`embed` before the unit length is taken, and whether the projection gave no more than half precision."""
        projected, layer_norm = self.projection(features), self.feature_norm
        if projected.shape[1] != self.embed_dim:  # of a projection that was put in the place of the head's own
            raise ValueError(
                f"the projection gives {projected.shape[1]} channels, the prototypes have {self.embed_dim}"
            )
        half = projected.dtype in (torch.bfloat16, torch.float16)
        if (self.projection_norm == "width" or layer_norm is not None) and kernels.normed_rows_apply():
            learned = (None, None, 0.0) if layer_norm is None else (layer_norm.weight, layer_norm.bias, layer_norm.eps)
            return kernels.normed_rows(projected, self.projection_norm, *learned), half
        embedding = embed(projected, self.projection_norm)
        if layer_norm is not None:
            embedding = layer_norm(unit(embedding) if self.projection_norm == "channel" else embedding)
        return embedding, half

    def _similarity(self, embedding: Tensor) -> Tensor:
        """(N, D) unit embeddings -> (N, C*K) similarity with every prototype."""
        return measured(cosine_similarity(embedding, self.prototypes), self.distance)

    def score(self, similarity: Tensor) -> Tensor:
        """(N, C*K) similarities -> (N, C) class scores, the logits of Eq. (2)."""
        return self._score(class_similarity(similarity, len(self.prototypes)))

    def _score(self, nearest: Tensor) -> Tensor:
        scores = nearest * self.log_scale.exp()
        return scores if self.score_norm is None else self.score_norm(scores)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D', h, w) features -> (B, C, h, w) class scores, in fp32 at least.

        Raises:
            ValueError: features of another shape.
        """
        B, h, w = check_features(features, self.in_channels)
        raw, half = self._embed(features)
        with torch.autocast(features.device.type, enabled=False):
            scores = self._class_scores(raw, half)
        return scores.view(B, h, w, scores.shape[1]).permute(0, 3, 1, 2)

    def _class_scores(self, raw: Tensor, half: bool) -> Tensor:
        """(N, D) embedding of any length, and whether it came in half precision -> (N, C)."""
        if kernels.class_cosines_apply():
            cosines = kernels.class_cosines(raw, self.prototypes.to(raw.dtype), half=half)
            return self._score(measured(cosines, self.distance))
        return self.score(self._similarity(unit(raw)))

    def losses(self, features: Tensor, labels: Tensor, *, gumbel: Tensor | None = None) -> Losses:
        """Scores, clustering and all losses of one batch, with the prototypes of before this step.

        Args:
            features: (B, D', h, w).
            labels: (B, H, W) int64 in [0, C) or `ignore_index`; any H, W. Cross-entropy is taken at this size, contrast
                and distance at feature size.
            gumbel: (B*h*w, K) noise of `assignment="gumbel"`, drawn here if not given.

        Raises:
            ValueError: features or labels of the wrong shape or type or, checked on the CPU only, labels out of range.
        """
        B, h, w = check_features(features, self.in_channels)
        check_labels(labels, len(features), self.num_classes, self.ignore_index)
        raw, half = self._embed(features)  # N D
        with torch.autocast(features.device.type, enabled=False):
            if kernels.one_pass_applies() and self.distance == "cosine":
                return self._losses_in_one_pass(raw, half, labels, (B, h, w), gumbel)
            classes = self._classes(labels, (h, w))  # N
            embedding = unit(raw)
            similarity = self._similarity(embedding)  # N CK
            scores = self.score(similarity)  # N C
            own = own_similarity(similarity.detach(), classes, self.num_classes)  # N K
            assignment, moving = self._assign(own, scores.detach().argmax(1), classes, gumbel, raw)
            ce = segmentation_cross_entropy(
                scores.view(B, h, w, -1).permute(0, 3, 1, 2),
                labels,
                ignore_index=self.ignore_index,
                class_weights=self.class_weights,
                align_corners=self.align_corners,
                total=self._total,
            )
            ppc = pixel_prototype_contrast(
                similarity,
                assignment,
                temperature=self.contrast_temperature,
                siblings=self.contrast_siblings,
                num_prototypes=self.num_prototypes,
                negatives=self._negatives(),
                total=self._total,
            )
            ppd = pixel_prototype_distance(similarity, assignment, total=self._total)
            total = total_loss(ce, ppc, ppd, self.contrast_weight, self.distance_weight)
            errors = None
            if self.update_from == "errors":
                wrong = label_errors(
                    scores.detach().view(B, h, w, -1).permute(0, 3, 1, 2),
                    labels,
                    ignore_index=self.ignore_index,
                    class_weights=self.class_weights,
                    align_corners=self.align_corners,
                )
                errors = errors_by_prototype(embedding.detach(), similarity.detach(), wrong, classes)
        return self._bundle(total, ce, ppc, ppd, assignment.view(B, h, w), embedding.detach(), moving, errors)

    def _losses_in_one_pass(
        self,
        raw: Tensor,
        half: bool,
        labels: Tensor,
        size: tuple[int, int, int],
        gumbel: Tensor | None,
    ) -> Losses:
        """What `losses` computes, without a table of all pixels by all prototypes."""
        settings = kernels.Settings(
            size=size,
            temperature=self.contrast_temperature,
            contrast_weight=self.contrast_weight,
            distance_weight=self.distance_weight,
            siblings=self.contrast_siblings,
            ignore_index=self.ignore_index,
            align_corners=self.align_corners,
            layer_norm=None if self.score_norm is None else self.score_norm.eps,
            predict=self.update_from == "correct",
            errors=self.update_from == "errors",
            negative_weight=self.num_classes * self.num_prototypes / (self.contrast_negatives or 1),
            half=half,
        )
        classes, sums = self._labelled(labels, size[1:], raw.dtype)
        label_share, pixel_share = shares(sums, self._total).unbind()
        batch = kernels.Batch(
            embedding=raw,
            prototypes=self.prototypes,
            log_scale=self.log_scale,
            norm_weight=None if self.score_norm is None else self.score_norm.weight,
            norm_bias=None if self.score_norm is None else self.score_norm.bias,
            labels=labels,
            classes=classes,
            class_weights=self.class_weights,
            label_share=label_share,
            pixel_share=pixel_share,
            settings=settings,
            negatives=self._negatives(),
            shard=self._shard,
        )
        total, ce, ppc, ppd, embedding, assignment, moving, *wrong = kernels.one_pass(
            batch, lambda own, predicted: self._assign(own, predicted, classes, gumbel, raw)
        )
        errors = Errors(*wrong) if settings.errors else None
        return self._bundle(total, ce, ppc, ppd, assignment.view(size), embedding, moving, errors)

    def _negatives(self) -> Tensor | None:
        if self.contrast_negatives is None:
            return None
        count = self.num_classes * self.num_prototypes
        return draw_negatives(count, self.contrast_negatives, self.prototypes.device)

    @staticmethod
    def _bundle(
        total: Tensor,
        ce: Tensor,
        ppc: Tensor,
        ppd: Tensor,
        assignment: Tensor,
        embedding: Tensor,
        moving: Tensor,
        errors: Errors | None,
    ) -> Losses:
        parts = {"loss": total.detach(), "ce": ce.detach(), "ppc": ppc.detach(), "ppd": ppd.detach()}
        return Losses(total, ce, ppc, ppd, assignment, embedding, moving, parts, errors)

    @torch.no_grad()
    def update(self, losses: Losses | Sequence[Losses]) -> None:
        """Eq. (8): move the prototypes towards the pixels they were given; call it after `backward`.

        Takes the losses of one batch or of all micro-batches of an optimiser step. A loss that is not finite, on any
        rank, moves nothing; an absent class keeps its bits. A step that a `GradScaler` skips has a finite loss: leave
        `update` out where `scaler.get_scale()` has fallen. All ranks must call it, and `losses`, alike.

        Raises:
            TypeError: not what `losses` gives.
            ValueError: no losses, or those of another head.
        """
        batches = [losses] if isinstance(losses, Losses) else losses
        if not isinstance(batches, Sequence) or not all(isinstance(batch, Losses) for batch in batches):
            raise TypeError(f"update takes what `losses` gave, or a list of such, given {type(losses).__name__}")
        if not batches:
            raise ValueError("update needs the losses of at least one batch")
        C, K, D = self.prototypes.shape
        for batch in batches:
            if batch.embedding is None or batch.embedding.shape[1] != D:
                raise ValueError(f"these losses are not of this head, whose embeddings have {D} channels")
            if batch.errors is not None and len(batch.errors.taken) != C * K:
                raise ValueError(f"these losses are not of this head, which has {C} x {K} prototypes")
        embedding = _joined([batch.embedding for batch in batches if batch.embedding is not None])
        moving = _joined([batch.moving for batch in batches if batch.moving is not None])
        totals = [batch.total.detach() for batch in batches]
        verdict = totals[0] if len(totals) == 1 else torch.stack(totals).sum()
        verdict = ranks.total(verdict)  # finite where all are, on all ranks: none may drift alone
        memory = Memory(self.prototypes, self.weight, self.length, self.usage, self.idle)
        rule: dict[str, Any] = {"momentum": self.momentum, "rule": self.momentum_rule, "count_cap": self.count_cap}
        summed = None
        if self.update_from == "errors":
            wrong = [batch.errors for batch in batches if batch.errors is not None]
            if len(wrong) < len(batches):
                raise ValueError('update_from="errors" needs what `losses` found wrong; these losses hold no errors')
            taken = sum((errors.taken for errors in wrong[1:]), wrong[0].taken)
            errors = Errors(taken, _joined([errors.lacking for errors in wrong]))
            summed = error_sums(embedding, moving, errors, self._total)
            if self.start == "data":  # what replaces a prototype is the mean of its pixels, not what they lack
                means, _ = assigned_sums(embedding, moving, C * K, self._total)
                summed = torch.where(self.weight.view(-1, 1) == 0, means, summed[0]), summed[1]
        counts = move_(memory, embedding, moving, verdict, total=self._total, summed=summed, **rule)
        if self.across_ranks == "average" and ranks.world_size() > 1:
            self.prototypes.copy_(unit(ranks.total(self.prototypes / ranks.world_size())))
            counts = ranks.total(counts)  # the log is one for all ranks
        note_usage_(memory, counts, verdict)
        if self.reseed_after is not None:
            reseed_(memory, embedding, moving, verdict, self.reseed_after)

    def distinctness(self) -> dict[str, float]:
        """How far the prototypes are from the collapse to one per class.

        Returns:
            `pairwise_cosine`: mean over classes of the mean cosine between a class's prototypes (nan for K = 1);
            `used`: share of all prototypes with at least a tenth of an equal share of their class's training pixels.
        """
        used = (self.usage >= DEAD_SHARE / self.num_prototypes).float().mean()
        return {"pairwise_cosine": float(pairwise_cosine(self.prototypes.float()).mean()), "used": float(used)}

    def _labelled(self, labels: Tensor, size: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`_classes`, and (2,) what this rank adds to the sums that the losses are divided by (`losses.shares`)."""
        known = (self.ignore_index, self.class_weights, dtype)
        if kernels.labelled_applies(labels, dtype):
            return kernels.labelled(self._sampled(labels, size), labels, self.num_classes, *known)
        classes = self._classes(labels, size)
        return classes, torch.stack([label_mass(labels, *known), (classes >= 0).sum(dtype=dtype)])

    def _sampled(self, labels: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, H, W) labels -> (N,) at feature size. float64 holds any label exactly."""
        if labels.shape[1:] == size:
            return labels.flatten()
        return F.interpolate(labels[:, None].double(), size=size, mode=self.label_sampling).flatten()

    def _classes(self, labels: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, H, W) labels -> (N,) class at feature size, -1 where void."""
        small = self._sampled(labels, size).long()
        valid = (small >= 0) & (small < self.num_classes)
        if 0 <= self.ignore_index < self.num_classes:
            valid &= small != self.ignore_index
        return torch.where(valid, small, -1)

    @torch.no_grad()
    def _assign(
        self, own: Tensor, predicted: Tensor | None, classes: Tensor, gumbel: Tensor | None, raw: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(N,) prototype each pixel was given for the losses, and the one it will move; -1 for none.

        Args:
            own: (N, K) similarities with the own class. predicted: (N,) class of highest score; see `update_from`.
            raw: (N, D) embedding, of any length.
        """
        C, K = self.prototypes.shape[:2]
        sinkhorn: dict[str, Any] = {"kappa": self.kappa, "iterations": self.sinkhorn_iterations}
        reduction: dict[str, Any] = {"total": self._total, "largest": self._largest}
        if self.draws:
            log_plan = clustering.sinkhorn(own, classes, C, **sinkhorn, **reduction)
            index = clustering.hard_assignment(
                log_plan, own, classes, C, small_classes=self.small_classes, total=self._total
            )
            drawn = clustering.drawn_assignment(log_plan, gumbel)
        elif self.assign is kmeans_assignment:
            rounds = self.sinkhorn_iterations
            drawn = index = kmeans_assignment(
                unit(raw), self.prototypes, own, classes, iterations=rounds, total=self._total
            )
        else:
            index = self.assign(own, classes, C, small_classes=self.small_classes, **sinkhorn, **reduction)
            drawn = index
        given = torch.add(index, classes, alpha=K).clamp_(min=-1)  # of void, -1, it lies in [-K, -1]
        moving = given if drawn is index else torch.add(drawn, classes, alpha=K).clamp_(min=-1)
        if self.update_from == "correct" and predicted is not None:
            moving = moving.masked_fill(predicted != classes, -1)
        return given, moving


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # one batch needs no copy
