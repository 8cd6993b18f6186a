"""`ShardedPrototypeHead`: the classes over the ranks, for vocabularies whose prototypes one device should not hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from protoseg.kernels.shards import Shard
from protoseg.method import clustering, ranks
from protoseg.method.head import DEAD_SHARE, PrototypeHead
from protoseg.method.losses import Losses, check_features, check_labels
from protoseg.method.prototypes import Memory, pairwise_cosine

PER_CLASS = Memory._fields  # buffers whose rows are split over ranks


class ShardedPrototypeHead(PrototypeHead):
    """`PrototypeHead` whose rank r of R holds the prototypes of C/R classes only.

        head = ShardedPrototypeHead(256, num_classes=100_000, ignore_index=-1)  # on every rank, with the same arguments
        net = DistributedDataParallel(net, broadcast_buffers=False)    # not forward_sync_buffers: see below

    It goes with ordinary data-parallel training: every rank brings its own images. Embeddings and labels are gathered
    from all ranks, each rank compares all pixels with its own classes, and what a pixel needs of all classes (largest
    score, sum of exponentials, the target's logit, of Eq. (2) and Eq. (5)) is reduced over ranks. The gradient of an
    embedding is summed over ranks on its way back to where it came from. Each class is clustered and moved by the rank
    that holds it, which needs no message. Losses (here the mean over all ranks, on each), gradients as data-parallel
    training averages them, assignments and prototypes equal those of the unsharded head to summation order.

    A rank stores C/R of the memory and does R times the pixels on C/R of the classes: the arithmetic is the same as
    without shards, the embeddings and labels of all ranks must fit on each. Sharding is for memory, not for speed.

    What differs for the caller: `prototypes` and the other per-class buffers hold this rank's classes [first, last);
    `Losses.embedding` and `.moving` are of all ranks' pixels and this rank's prototypes, as `update` wants them. All
    ranks must call `losses`, `forward`, `update` and `backward` alike, with features and labels of the same (h, w) and
    (H, W); numbers of images may differ. `state_dict` is one rank's part; `whole_state_dict` and
    `load_whole_state_dict` go to and from the unsharded head. `DistributedDataParallel` must never copy buffers from
    rank to rank: `broadcast_buffers=False` keeps it from that, `forward_sync_buffers=False` still does it once. The
    lines are those of the one pass: `plain_only`, compilers and second derivatives do not apply.

    Args:
        equal_batches: a promise that in training all ranks bring equally many images, so that none must be asked:
            asking makes the host wait for the device.
        in_channels, num_classes, named: as of `PrototypeHead`. The start is the first rank's.

    Raises:
        ValueError: fewer classes than ranks; `score_norm="layer_norm"` (it ties all classes' scores to one another),
            `across_ranks="average"`, or another distance than the cosine.
    """

    def __init__(self, in_channels: int, num_classes: int, *, equal_batches: bool = False, **named: Any):
        super().__init__(in_channels, num_classes, **named)
        refused = {
            "score_norm": self.score_norm is not None,
            "across_ranks": self.across_ranks != "exact",
            "distance": self.distance != "cosine",
        }
        for name, wrong in refused.items():
            if wrong:
                raise ValueError(f"classes cannot be sharded over ranks with this {name}; leave it at its default")
        world = ranks.world_size()
        if num_classes < world:
            raise ValueError(f"{num_classes} classes cannot be sharded over {world} ranks; use fewer ranks")
        self.equal_batches = equal_batches
        self.class_counts = [num_classes // world + (r < num_classes % world) for r in range(world)]
        self.first = sum(self.class_counts[: ranks.rank()])
        self.last = self.first + self.class_counts[ranks.rank()]
        self._total = self._largest = clustering.alone  # a class's pixels are all here
        if world > 1:
            self._shard = Shard(self.first, self.last - self.first, max(self.class_counts), ranks.total, ranks.largest)
        for name in PER_CLASS:
            setattr(self, name, self._part_of_first(getattr(self, name)))

    def _part_of_first(self, whole: Tensor) -> Tensor:
        """This rank's classes of what the first rank has for all of them."""
        return ranks.from_first(whole)[self.first : self.last].clone()

    def reset_parameters(self) -> None:
        """As of the unsharded head; every rank must call it. The start is the first rank's."""
        beginning = self._beginning()
        for name, value in beginning.items():
            if name in PER_CLASS:
                beginning[name] = self._part_of_first(value.to(self.prototypes.device))
        self._begin(beginning)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, classes=[{self.first}, {self.last})"

    def forward(self, features: Tensor) -> Tensor:
        """(B, D', h, w) features -> (B, C, h, w) scores of all classes, in fp32 at least, for this rank's images.

        Every rank must call it; without images, with B = 0. Sizes may differ.
        """
        B, h, w = check_features(features, self.in_channels)
        pixels = self._numbers([B * h * w], features.device)
        embedded, half = self._embed(features)
        raw = ranks.gathered(embedded, [n for (n,) in pixels])
        with torch.autocast(features.device.type, enabled=False):
            scores = ranks.exchanged(self._class_scores(raw, half), [n for (n,) in pixels], self.class_counts)
        return scores.view(B, h, w, -1).permute(0, 3, 1, 2)

    def losses(self, features: Tensor, labels: Tensor, *, gumbel: Tensor | None = None) -> Losses:
        """As `PrototypeHead.losses`, over the images of all ranks; `.assignment` is of this rank's.

        Raises:
            ValueError: labels of the wrong shape or type or, checked on the CPU only, out of range; another size than
                on another rank.
        """
        _, h, w = check_features(features, self.in_channels)
        check_labels(labels, len(features), self.num_classes, self.ignore_index)
        images = self._images(features, labels)
        pixels = [n * h * w for n in images]
        embedded, half = self._embed(features)
        raw = ranks.gathered(embedded, pixels)
        noise = None if gumbel is None else ranks.gathered(gumbel, pixels)
        size = (sum(images), h, w)
        with torch.autocast(features.device.type, enabled=False):
            found = self._losses_in_one_pass(raw, half, ranks.gathered(labels, images), size, noise)
        assert found.assignment is not None
        given = torch.where(found.assignment < 0, -1, found.assignment + self.first * self.num_prototypes)
        mine = slice(sum(images[: ranks.rank()]), sum(images[: ranks.rank() + 1]))
        return replace(
            found,
            total=ranks.shared(found.total),
            ce=ranks.shared(found.ce),
            ppc=ranks.shared(found.ppc),
            ppd=ranks.shared(found.ppd),
            assignment=ranks.largest(given)[mine],
        )

    @torch.no_grad()
    def update(self, losses: Losses | Sequence[Losses]) -> None:
        """Eq. (8) for this rank's classes; see `PrototypeHead.update`."""
        batches = [losses] if isinstance(losses, Losses) else list(losses)
        # One message decides for all ranks; then each moves its own classes alone.
        batches = [replace(batch, total=ranks.total(batch.total.detach())) for batch in batches]
        with ranks.by_itself():
            super().update(batches)

    def distinctness(self) -> dict[str, float]:
        """As of the unsharded head; every rank must call it."""
        used = (self.usage >= DEAD_SHARE / self.num_prototypes).float().mean(1)
        sums = torch.stack([pairwise_cosine(self.prototypes.float()).sum(), used.sum()])
        cosine, share = (ranks.total(sums) / self.num_classes).tolist()
        return {"pairwise_cosine": cosine, "used": share}

    def whole_state_dict(self) -> dict[str, Tensor]:
        """The `state_dict` of the unsharded head, on every rank; every rank must call it."""
        state = {name: value.detach() for name, value in self.state_dict().items()}
        return {n: ranks.gathered(v, self.class_counts) if n in PER_CLASS else v for n, v in state.items()}

    def load_whole_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's part of an unsharded head's `state_dict`; strict. Needs no other rank."""
        wrong = [name for name in PER_CLASS if name in state and len(state[name]) != self.num_classes]
        if wrong:
            raise ValueError(
                f"{wrong[0]} holds {len(state[wrong[0]])} classes, expected all {self.num_classes} of an unsharded "
                "head; one rank's part is for load_state_dict"
            )
        self.load_state_dict({n: v[self.first : self.last] if n in PER_CLASS else v for n, v in state.items()})

    def _assign(
        self, own: Tensor, predicted: Tensor | None, classes: Tensor, gumbel: Tensor | None, raw: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pixels of other ranks' classes are as void here: their own rank gives them a prototype."""
        if self._shard is None:
            return super()._assign(own, predicted, classes, gumbel, raw)
        predicted = None if predicted is None else predicted - self.first
        with ranks.by_itself():
            return super()._assign(own, predicted, self._shard.local(classes), gumbel, raw)

    def _negatives(self) -> Tensor | None:
        drawn = super()._negatives()
        if drawn is None:
            return None
        K = self.num_prototypes
        here = (drawn >= self.first * K) & (drawn < self.last * K)
        return torch.where(here, drawn - self.first * K, -1)

    def _numbers(self, numbers: list[int], device: torch.device) -> list[list[int]]:
        if self.equal_batches and self.training:
            return [numbers] * len(self.class_counts)
        return ranks.together(numbers, device)

    def _images(self, features: Tensor, labels: Tensor) -> list[int]:
        """How many images each rank brings."""
        B, _, *size = features.shape
        shapes = self._numbers([B, *size, *labels.shape[1:]], features.device)
        if any(shape[1:] != shapes[0][1:] for shape in shapes):
            told = "; ".join(f"rank {r}: {tuple(s[1:3])} and {tuple(s[3:])}" for r, s in enumerate(shapes))
            raise ValueError(f"features and labels must be of one size on all ranks, given {told}; crop to one size")
        return [shape[0] for shape in shapes]
