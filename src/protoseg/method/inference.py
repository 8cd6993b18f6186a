"""A trained `PrototypeHead` made ready to answer: the same scores and labels for less work, nothing left to learn.

What is exact, and when it is done (M: arithmetic of a pixel):

* Projection, length and products go band by band through the cache; the embedding is never whole. The length divides
  the C class maxima, not the D channels.
* **Thinning**: behind a last linear layer of H inputs the embedding lies in H + 1 dimensions at most. Where D is more,
  layer and prototypes are turned into them (QR); all cosines stay. M falls from D (H + CK) to (H + 1) (H + CK).
* **Folding**: p . (W x + b) = (W^T p) . x + p . b. The arg-max over classes does not change with the length of the
  embedding, so labels need no embedding: M is H CK instead of D (H + CK), and the rule takes the smaller. Scores need
  the length, for which the embedding has to be made anyway; there, thinning gets all that is to be had.
  Through a bilinear resize the lengths count, as they weigh neighbours against each other: they are made for the pixels
  along the borders of classes alone.
* A norm of the features over channels, of rows (`projection_norm="width"`) or of the scores over classes, or another
  distance than the cosine, stands between and forbids folding; such heads take the rest.

* **Screening**, fp32 on a CPU with a C compiler: labels need only know which class is nearest. Codes of 16 bits tell it
  at most pixels, with proof, in half the time (`kernels.screening`); what they leave open is made in full precision. So
  no label changes. Where they leave more than a quarter open they are given up.

* Prototypes of all classes share much of their direction. It is taken off before they are rounded and given back as one
  number a pixel, which no arg-max sees: 14 to 42 % fewer labels lost on CamVid with two trained networks. Folded, int8
  lost more than twice as many there, so a head in bfloat16 or int8 does not fold.

Pruning leaves out prototypes that training left idle, bfloat16 and int8 round: these may change labels, so the share of
labels kept on features one gives is measured and must be as large as one asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from protoseg.kernels import inference as kernel
from protoseg.kernels import screening
from protoseg.kernels.inference import Precision
from protoseg.method.head import DEAD_SHARE, PromotedLayerNorm, PrototypeHead
from protoseg.method.losses import check_features
from protoseg.method.similarity import measured, unit

BORDER = 0.25  # share of feature pixels at a border of classes; in CamVid's masks at stride 4 it is 0.22
DOUBTFUL = 0.25  # share of pixels that 16 bit codes may leave open; with more they are given up for the rest
# Through a resize many pixels are made again, so codes pay from this many prototypes on (with 190 they lost as often as
# they gained) and this many times the layers' arithmetic in the products (at 1.2 times they lost).
RESIZED, OUTWEIGHED = 256, 2


def freeze(
    head: PrototypeHead,
    *,
    prune: bool = False,
    precision: Precision = "full",
    calibration: Tensor | Sequence[Tensor] | None = None,
    agreement: float = 0.999,
) -> FrozenHead:
    """The inference form of a head: a copy, in eval mode, that later training of `head` does not change.

        fast = freeze(head, precision="int8", calibration=features)
        fast(features)                    # (B, C, h, w) scores, as head(features)
        fast.labels(features, (H, W))     # (B, H, W) their arg-max after the bilinear resize

    Args:
        head: a trained head.
        prune: leave out prototypes that hold less than a tenth of an equal share of their class in the moving average
            of training (`usage`); a class keeps at least its most used one.
        precision: of the products with the prototypes: `full`, `bf16`, or `int8` with a scale for each prototype and
            each pixel. Everything before and after stays in full precision.
        calibration: (B, D', h, w) features of real images, or several such; must be given for `bf16` and `int8`.
        agreement: the least share of the calibration pixels whose label is the head's own.

    Raises:
        ValueError: fewer labels kept than `agreement`, says how many; precision without calibration; an unknown
            precision, or one this machine cannot compute in; a head whose classes are spread over ranks, or whose
            projection is not one that `build_projection` makes.
    """
    if precision not in ("full", "bf16", "int8"):
        raise ValueError(f'precision must be "full", "bf16" or "int8", given {precision!r}')
    device = head.prototypes.device
    if len(head.prototypes) != head.num_classes:
        raise ValueError(
            f"this rank holds {len(head.prototypes)} of the {head.num_classes} classes; freeze a whole head"
        )
    if precision != "full" and calibration is None:
        raise ValueError(
            f'precision="{precision}" rounds, and must show on calibration features that labels stay: '
            "give the head's input on some real images, e.g. calibration=segmenter.features(images)"
        )
    if precision == "int8" and (reason := kernel.int8_reason(device.type)):
        raise ValueError(f'precision="int8" does not work on {device.type} here ({reason}); use "bf16" or "full"')
    frozen = FrozenHead(head, prune=prune, precision=precision)
    if calibration is not None:
        batches = [calibration] if isinstance(calibration, Tensor) else list(calibration)
        frozen.agreement = label_agreement(head, frozen, batches)
        if frozen.agreement < agreement:
            changed = [f"precision {precision}"] * (precision != "full") + ["pruning"] * prune
            raise ValueError(
                f"{' and '.join(changed) or 'freezing'} keeps {frozen.agreement:.4%} of the labels of the calibration "
                f"features, less than the {agreement:.4%} asked for; "
                'take a finer precision ("full" keeps all), leave prune off, or lower agreement'
            )
    return frozen


@torch.no_grad()
def label_agreement(head: nn.Module, other: FrozenHead, batches: Sequence[Tensor]) -> float:
    """Share of the pixels of (B, D', h, w) features to which `other` gives the label of highest score of `head`."""
    same = pixels = 0
    for features in batches:
        if not features.numel():
            continue
        expected = head(features).argmax(1)
        same += int((other.labels(features) == expected).sum())
        pixels += expected.numel()
    if not pixels:
        raise ValueError("calibration holds no pixel; give (B, D', h, w) features of some real images")
    return same / pixels


def bilinear_labels(
    scores: Tensor, size: tuple[int, int], *, align_corners: bool = False, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Arg-max over classes of (B, C, h, w) scores resized to `size`, without the resized table.

    Away from ties it is `F.interpolate(scores, size, mode="bilinear").argmax(1)`; how, `kernels.inference` says.

    Returns:
        (B, H, W).

    Raises:
        ValueError: a type of labels that does not hold all classes.
    """
    B, C, h, w = scores.shape
    check_holds(dtype, C)
    rows = scores.permute(0, 2, 3, 1).reshape(-1, C)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32)).contiguous()
    return kernel.resized_labels(rows, (B, h, w), size, align_corners, dtype=dtype)


class Prototypes(nn.Module):
    """The kept prototypes in one precision, classes with equally many of them side by side.

    Args:
        vectors: (C, K, D), of any length. bias: (C, K) to be added to the products, or None.
        kept: (C, K) bool, at least one a class.
    """

    vectors: Tensor
    step: Tensor | None
    centre: Tensor | None
    bias: Tensor | None
    ids: Tensor | None

    def __init__(self, vectors: Tensor, bias: Tensor | None, kept: Tensor, precision: Precision, dtype: torch.dtype):
        super().__init__()
        counts = kept.sum(1)  # C
        order = torch.argsort(counts, stable=True)  # classes, those with fewest prototypes first
        rows = vectors[order][kept[order]]  # P D
        self.num_classes = len(vectors)
        sizes, classes = counts.unique(return_counts=True)
        self.groups = list(zip(classes.tolist(), sizes.tolist()))  # how many classes, prototypes of each
        self.register_buffer("ids", order if len(self.groups) > 1 else None)
        self.register_buffer("bias", None if bias is None else bias[order][kept[order]][:, None].to(dtype))
        centre = step = None
        if precision != "full":
            centre = rows.mean(0)
            rows = rows - centre
        if precision == "int8":
            rows, step = kernel.quantize(rows)
            step = step.to(dtype)
        rows = rows.to({"full": dtype, "bf16": torch.bfloat16, "int8": torch.int8}[precision])
        self.register_buffer("vectors", rows.contiguous())
        self.register_buffer("step", step)
        self.register_buffer("centre", None if centre is None else centre.to(dtype))

    def table(self) -> kernel.Table:
        """What the kernel takes."""
        groups, start = [], 0
        for classes, k in self.groups:
            groups.append((None if self.ids is None else self.ids[start : start + classes], classes, k))
            start += classes
        return kernel.Table(self.vectors, self.step, self.centre, self.bias, tuple(groups), self.num_classes)


class FrozenHead(nn.Module):
    """Made by `freeze`. Keeps the head's contract as far as answers go: `head(features)`, `num_classes`, ...

    Attributes:
        precision: of the products.
        kept: how many prototypes are left. folded, thinned: what was done to the last layer (see the module).
        screen: 16 bit codes of the prototypes, or None where they do not pay; set to None, labels go without.
        agreement: share of the calibration labels kept, or None where none were given.
    """

    log_scale: Tensor

    def __init__(self, head: PrototypeHead, *, prune: bool = False, precision: Precision = "full"):
        super().__init__()
        self.num_classes, self.in_channels = head.num_classes, head.in_channels
        self.ignore_index, self.align_corners = head.ignore_index, head.align_corners
        self.projection_norm, self.precision = head.projection_norm, precision
        self.agreement: float | None = None
        self.distance = head.distance
        dtype = torch.promote_types(head.prototypes.dtype, torch.float32)
        kept = used_prototypes(head.usage) if prune else torch.ones_like(head.usage, dtype=torch.bool)
        self.kept = int(kept.sum())
        self.feature_norm = _copied(head.feature_norm, dtype)
        self.score_norm = _copied(head.score_norm, dtype)
        self.register_buffer("log_scale", head.log_scale.detach().to(dtype, copy=True))

        layers = [(_weight(m).double(), _bias(m).double()) for m in _convolutions(head.projection)]
        vectors = head.prototypes.detach().double()  # C K D
        straight = self.projection_norm == "channel" and self.feature_norm is None and bool(layers)
        D, hidden = head.embed_dim, head.in_channels
        self.thinned = straight and hidden + 1 < D
        if self.thinned:
            q, r = torch.linalg.qr(torch.cat([layers[-1][0], layers[-1][1][:, None]], 1))  # D (H+1), (H+1) (H+1)
            layers[-1], vectors = (r[:, :-1], r[:, -1]), vectors @ q
        self.layers = nn.ModuleList(_linear(weight, bias, dtype) for weight, bias in layers)
        self.prototypes = Prototypes(vectors, None, kept, precision, dtype)
        self.folded: Prototypes | None = None
        r = vectors.shape[2]
        made = BORDER * (hidden * hidden * (len(layers) - 1) + hidden * r)  # again, of lengths at borders
        self.plain_scores = self.score_norm is None and self.distance == "cosine"  # as the maxima, up to one factor
        cheaper = self.kept * hidden + made < r * (hidden + self.kept)
        if straight and self.plain_scores and precision == "full" and cheaper:
            weight, bias = layers[-1]
            self.folded = Prototypes(vectors @ weight, vectors @ bias, kept, precision, dtype)
        self.screen: screening.Screen | None = None
        self.requires_grad_(False)
        self.eval()
        _pack(self)
        self.register_load_state_dict_post_hook(_pack)

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenHead:
        """`half()` and `float()` are for the network below: how a frozen head rounds, `freeze` was told."""
        halves = {torch.bfloat16, torch.float16}

        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            other = moved.dtype != tensor.dtype and not halves.isdisjoint((moved.dtype, tensor.dtype))
            return tensor.to(moved.device) if other else moved

        return super()._apply(kept, recurse)

    def extra_repr(self) -> str:
        made = {"thinned": self.thinned, "folded": self.folded is not None, "screened": self.screen is not None}
        done = [name for name, yes in made.items() if yes]
        return f"num_classes={self.num_classes}, kept={self.kept}, precision={self.precision}, {', '.join(done)}"

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """(B, D', h, w) features -> (B, C, h, w) class scores, in the head's own precision, fp32 at least.

        Raises:
            ValueError: features of another shape.
        """
        features, scores = self._prepared(features), None
        B, _, h, w = features.shape
        with torch.autocast(features.device.type, enabled=False):
            table = self.prototypes.table()
            for start, raw in self._embeddings(features):
                best = kernel.class_maxima(raw, table)  # C n
                if scores is None:
                    scores = best.new_empty(self.num_classes, B * h * w)
                scores[:, start : start + len(raw)] = self._scores(best, raw)
        if scores is None:
            return features.new_empty(B, self.num_classes, h, w)
        return scores.view(-1, B, h, w).transpose(0, 1)

    @torch.no_grad()
    def labels(
        self, features: Tensor, size: tuple[int, int] | None = None, *, dtype: torch.dtype = torch.int64
    ) -> Tensor:
        """The class of highest score at every pixel: the arg-max of `forward` after the bilinear resize to `size`.

        Args:
            features: (B, D', h, w).
            size: (H, W); that of the features if not given.
            dtype: of the labels.

        Returns:
            (B, H, W).

        Raises:
            ValueError: features of another shape, or a type that does not hold all classes.
        """
        check_holds(dtype, self.num_classes)
        features = self._prepared(features)
        B, _, h, w = features.shape
        size = (h, w) if size is None else size
        N, moved = B * h * w, size != (h, w)
        with torch.autocast(features.device.type, enabled=False):
            folded, doubtful = self.folded is not None, 0
            table = (self.folded or self.prototypes).table()
            screen = self.screen if not moved or self._screens_mixes(table) else None
            best = torch.empty(N, dtype=torch.int64, device=features.device)
            mixed: _Mixed | None = None  # only a resize needs scores
            for start, raw in self._embeddings(features, hidden=folded, width=None if screen is None else kernel.MOST):
                part = slice(start, start + len(raw))
                if moved and mixed is None:
                    mixed = _Mixed(self, features, table, raw)
                if screen is not None and screening.takes(screen, raw):
                    into = () if mixed is None else (mixed.rows[part], mixed.error[part])
                    best[part] = screening.certain_labels(raw, screen, *into)
                    doubtful += int((best[part] < 0).sum())
                    if doubtful > DOUBTFUL * part.stop:
                        screen = None
                else:
                    true = self._rows(raw, table)
                    best[part] = kernel.best_class(true)
                    if mixed is not None:
                        mixed.rows[part] = true
                if mixed is not None:
                    mixed.note_lengths(part, raw)
            for index in (best < 0).nonzero()[:, 0].split(kernel.MOST):
                true = self._true_rows(features, index, table)
                best[index] = kernel.best_class(true)
                if mixed is not None:
                    mixed.rows[index], mixed.error[index] = true, 0
            if mixed is None:
                return best.view(B, h, w).to(dtype) if N else torch.empty(B, *size, dtype=dtype, device=best.device)
            return mixed.labels(best, size, dtype)

    def _screens_mixes(self, table: kernel.Table) -> bool:
        layers = sum(p.numel() for p in self.layers.parameters())
        return self.kept >= RESIZED and table.vectors.numel() >= OUTWEIGHED * layers

    def _rows(self, raw: Tensor, table: kernel.Table) -> Tensor:
        """(n, D) embedding, or what goes into a folded table -> (n, C) scores, or class maxima that rank as they do."""
        parts = []
        for part in raw.split(kernel.band_width(self.kept, self.precision, raw.device)):
            best = kernel.class_maxima(part, table)  # C n
            parts.append((best if self.plain_scores else self._scores(best, part)).T.contiguous())
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _true_rows(self, features: Tensor, index: Tensor, table: kernel.Table) -> Tensor:
        """`_rows` of these pixels alone, (m,) indices in the order (b h w)."""
        return self._rows(self._embedded(_pixels(features, index), self.folded is not None), table)

    def _scores(self, best: Tensor, raw: Tensor) -> Tensor:
        """(C, n) class maxima of an embedding (n, D) of any length -> (C, n) scores, as `PrototypeHead.score`."""
        scores = measured(best.div_(_length(raw)), self.distance) * self.log_scale.exp().to(raw.dtype)
        return scores if self.score_norm is None else self.score_norm(scores.T).T

    def _prepared(self, features: Tensor) -> Tensor:
        """Features in the head's precision; those of a head with a norm along the width are projected here, whole."""
        check_features(features, self.in_channels)
        features = features.to(self.log_scale.dtype)
        if self.projection_norm != "width":
            return features
        B, _, h, w = features.shape
        projected: Tensor | None = None
        for start, raw in self._projected(features):
            if projected is None:
                projected = raw.new_empty(B * h * w, raw.shape[1])
            projected[start : start + len(raw)] = raw
        return features if projected is None else unit(projected.view(B, h, w, -1).permute(0, 3, 1, 2), dim=-1)

    def _embeddings(self, features: Tensor, hidden: bool = False, width: int | None = None) -> Any:
        """(start, (n, D) embedding of any length) in bands; with `hidden` what goes into the last layer instead."""
        width = width or kernel.band_width(self.kept, self.precision, features.device)
        for start, rows in kernel.bands(features, width):
            yield start, self._embedded(rows, hidden)

    def _embedded(self, rows: Tensor, hidden: bool = False) -> Tensor:
        raw = self._through(rows, 0 if self.projection_norm == "width" else len(self.layers) - hidden)
        if self.feature_norm is None:
            return raw
        return self.feature_norm(unit(raw) if self.projection_norm == "channel" else raw)

    def _projected(self, features: Tensor) -> Any:
        for start, rows in kernel.bands(features, kernel.band_width(self.kept, self.precision, features.device)):
            yield start, self._through(rows, len(self.layers))

    def _through(self, rows: Tensor, depth: int) -> Tensor:
        for i, layer in enumerate(self.layers[:depth]):
            assert isinstance(layer, nn.Linear)
            rows = kernel.linear(rows, layer.weight, layer.bias, relu=i + 1 < len(self.layers))
        return rows


class _Mixed:
    """What a bilinear resize mixes: scores of all pixels, some of them rounded until a mix asks for the true ones.

    Attributes:
        rows: (N, C) scores, of an embedding of any length where no norm over the classes has taken it out.
        error: (N,) by how much the difference of two scores of a row may be wrong; 0 of true rows.
        factor: (N,) one over the length, NaN where not yet known; None where scores do not lack it.
    """

    def __init__(self, head: FrozenHead, features: Tensor, table: kernel.Table, like: Tensor):
        self.head, self.features, self.table = head, features, table
        N = len(features) * features[0, 0].numel()
        self.rows, self.error = like.new_empty(N, head.num_classes), like.new_zeros(N)
        self.factor = like.new_full((N,), torch.nan) if head.plain_scores else None

    def note_lengths(self, part: slice, raw: Tensor) -> None:
        """Of an embedding at hand; a folded head makes none, and learns the lengths where they are asked for."""
        if self.factor is not None and self.head.folded is None:
            self.factor[part] = _length(raw).reciprocal_()

    def labels(self, best: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """(N,) true label of every pixel -> (B, H, W) labels of the resized scores."""
        B, _, h, w = self.features.shape
        folded = self.head.folded is not None
        if folded and self.factor is not None and size[0] >= h and size[1] >= w:  # all at once what would be asked for
            self._learn_lengths(kernel.border(best.view(B, h, w)), self.factor)
        return kernel.resized_labels(
            self.rows, (B, h, w), size, self.head.align_corners, weigh=None if self.factor is None else self._weigh,
            best=best, error=self.error if bool(self.error.any()) else None, refine=self._refine, dtype=dtype,
        )  # fmt: skip

    def _refine(self, index: Tensor) -> None:
        for part in index[self.error[index] != 0].unique().split(kernel.MOST):
            self.rows[part], self.error[part] = self.head._true_rows(self.features, part, self.table), 0

    def _weigh(self, index: Tensor) -> Tensor:
        assert self.factor is not None
        if self.head.folded is not None:
            self._learn_lengths(index, self.factor)
        return self.factor[index]

    def _learn_lengths(self, index: Tensor, factor: Tensor) -> None:
        """Fill in `factor` at `index`, where it is not known yet: the embedding of these pixels alone is made."""
        wanted = torch.zeros_like(factor, dtype=torch.bool)
        wanted[index] = True
        for part in (wanted & factor.isnan()).nonzero()[:, 0].split(kernel.MOST):
            factor[part] = _length(self.head._embedded(_pixels(self.features, part))).reciprocal_()


def _pack(frozen: FrozenHead, _: Any = None) -> None:
    """Codes of the prototypes that `labels` takes, where they gain."""
    table = (frozen.folded or frozen.prototypes).table()
    fits = frozen.plain_scores and frozen.precision == "full" and screening.pays(table)
    frozen.screen = screening.pack(table) if fits else None


def used_prototypes(usage: Tensor) -> Tensor:
    """(C, K) share of its class that a prototype holds -> bool, those worth keeping; at least one a class."""
    most = torch.zeros_like(usage, dtype=torch.bool).scatter_(1, usage.argmax(1, keepdim=True), True)
    return (usage >= DEAD_SHARE / usage.shape[1]) | most


def _pixels(features: Tensor, index: Tensor) -> Tensor:
    """(B, D', h, w), (m,) indices in the order (b h w) -> (m, D')."""
    flat = features.flatten(2)  # B D' hw
    return flat[index // flat.shape[2], :, index % flat.shape[2]]


def _length(raw: Tensor) -> Tensor:
    return torch.linalg.vector_norm(raw, dim=1).clamp_min_(1e-12)  # as the unit length of Eq. (1)


def check_holds(dtype: torch.dtype, num_classes: int) -> None:
    """
    Raises:
        ValueError: labels of this type cannot name all classes.
    """
    if dtype.is_floating_point:
        most = 2 / torch.finfo(dtype).eps  # up to there all whole numbers are among its values
    else:
        most = 1 if dtype == torch.bool else torch.iinfo(dtype).max
    if num_classes - 1 > most:
        raise ValueError(f"labels in {dtype} cannot name {num_classes} classes; take another dtype")


def _convolutions(projection: nn.Module) -> list[nn.Conv2d]:
    """The layers of a projection, between which is ReLU.

    Raises:
        ValueError: `build_projection` makes no such projection.
    """
    if isinstance(projection, nn.Identity):
        return []
    layers = list(projection) if isinstance(projection, nn.Sequential) else [projection]
    found = [layer for layer in layers[::2] if isinstance(layer, nn.Conv2d)]
    between = [layer for layer in layers[1::2] if isinstance(layer, nn.ReLU)]
    plain = all(m.kernel_size == m.stride == (1, 1) and m.groups == 1 and m.padding == (0, 0) for m in found)
    biased = all(m.bias is not None for m in found)
    if not (plain and biased and len(found) == len(between) + 1 and len(found) + len(between) == len(layers)):
        raise ValueError(
            "only projections as PrototypeHead makes them, 1x1 convolutions with ReLU between, can be frozen; this has "
            f"{', '.join(type(layer).__name__ for layer in layers)}; answer through the head itself"
        )
    return found


def _weight(convolution: nn.Conv2d) -> Tensor:
    return convolution.weight.detach()[:, :, 0, 0]


def _bias(convolution: nn.Conv2d) -> Tensor:
    assert convolution.bias is not None
    return convolution.bias.detach()


def _linear(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta", dtype=dtype)
    layer.weight, layer.bias = (nn.Parameter(v.to(dtype, copy=True).contiguous()) for v in (weight, bias))
    return layer


def _copied(norm: nn.LayerNorm | None, dtype: torch.dtype) -> PromotedLayerNorm | None:
    if norm is None:
        return None
    copy = PromotedLayerNorm(norm.normalized_shape, eps=norm.eps).to(norm.weight.device, dtype)
    copy.load_state_dict(norm.state_dict())
    return copy
