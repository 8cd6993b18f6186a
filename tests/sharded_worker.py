"""One rank of the tests in test_sharded.py, and the same training in one process, unsharded and by the plain lines.

    python sharded_worker.py RANK FOLDER

As in distributed_worker.py: the same processes serve three ranks first, then two of them.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from protoseg import kernels
from protoseg.kernels import similarity
from protoseg.method import ranks
from protoseg.method.head import PrototypeHead
from protoseg.method.losses import Losses
from protoseg.method.sharded import ShardedPrototypeHead
from protoseg.method.similarity import unit

CLASSES, STEPS, VOID = 5, 3, 255  # 5 classes over 2 ranks: 3 + 2; over 3: 2 + 2 + 1
IMAGES = {2: [[0, 1], [2]], 3: [[0, 1], [2], [3]]}  # the last of three ranks sees nothing but void

VARIANTS: dict[str, dict] = {
    "default": {},
    "labels at feature size": {"fine": 1},
    "no siblings": {"contrast_siblings": False, "class_weights": [0.5, 2.0, 1.0, 3.0, 0.1]},
    "drawn negatives": {"contrast_negatives": 4},
    "drawn negatives, no siblings": {"contrast_negatives": 4, "contrast_siblings": False},
    "data start": {"start": "data", "momentum_rule": "count_aware", "count_cap": 12.0},
    "re-seeding": {"assignment": "nearest", "reseed_after": 1, "momentum": 0.5},
    "correct only": {"update_from": "correct", "momentum": 0.5},
    "errors": {"update_from": "errors", "momentum": 0.5, "class_weights": [0.5, 2.0, 1.0, 3.0, 0.1]},
    "errors at feature size": {"update_from": "errors", "momentum": 0.5, "fine": 1, "contrast_siblings": False},
    "drawn assignment": {"assignment": "gumbel"},
    "LayerNorm before": {"feature_norm": "layer_norm", "align_corners": True},
}


class Net(nn.Module):
    """A 1x1 trunk and the head, with the losses as its forward."""

    def __init__(self, variant: str, sharded: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind = ShardedPrototypeHead if sharded else PrototypeHead
        named = {name: value for name, value in VARIANTS[variant].items() if name != "fine"}
        self.trunk = nn.Conv2d(3, 6, 1)
        self.head = kind(6, CLASSES, num_prototypes=3, embed_dim=6, **named)
        self.double()
        self.head.prototypes.copy_(unit(self.head.prototypes))
        if variant == "re-seeding":
            self.head.usage[:, 1] = 0
            self.head.idle[:, 1] = 5

    def forward(self, images: Tensor, labels: Tensor, gumbel: Tensor) -> Losses:
        return self.head.losses(self.trunk(images), labels, gumbel=gumbel)


def global_batch(step: int, world: int, fine: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and noise of all ranks. Class 3 is seen by one rank only, in step 1 by nobody."""
    g = torch.Generator().manual_seed(100 + step)
    count = sum(len(mine) for mine in IMAGES[world])
    images = torch.randn(count, 3, 4, 5, generator=g, dtype=torch.float64)
    labels = torch.randint(3, (count, 4 * fine, 5 * fine), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.2] = 4
    labels[torch.rand(labels.shape, generator=g) < 0.1] = VOID
    if step != 1:
        labels[2, :3] = 3
    labels[3:] = VOID
    gumbel = -torch.empty(count, 20, 3, dtype=torch.float64).exponential_(generator=g).log()
    return images, labels, gumbel


def train(variant: str, world: int, rank: int | None) -> dict:
    """A few steps of one rank (None: one process with every image, unsharded). Everything worth comparing, by step."""
    net = Net(variant, sharded=rank is not None)
    wrapped: nn.Module = net
    if rank is not None:
        wrapped = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    mine = [i for images in IMAGES[world] for i in images] if rank is None else IMAGES[world][rank]
    names = ("total", "ce", "ppc", "ppd", "assignment")
    seen: dict[str, list] = {name: [] for name in (*names, "gradient", "state", "scores", "distinctness")}
    for step in range(STEPS):
        images, labels, gumbel = (t[mine] for t in global_batch(step, world, VARIANTS[variant].get("fine", 2)))
        torch.manual_seed(50 + step + 1000 * (rank or 0))  # of the drawn negatives: the first rank's counts
        losses = wrapped(images, labels, gumbel.flatten(0, 1))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        net.head.update(losses)
        for name in names:
            seen[name].append(getattr(losses, name).detach().clone())
        seen["gradient"].append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
        state = net.head.state_dict() if rank is None else net.head.whole_state_dict()
        seen["state"].append({name: value.clone() for name, value in state.items()})
        with torch.no_grad():
            seen["scores"].append(net.head(net.trunk(images)))
        seen["distinctness"].append(net.head.distinctness())
    torch.manual_seed(7 + (rank or 0))  # the first rank's start counts
    net.head.reset_parameters()
    state = net.head.state_dict() if rank is None else net.head.whole_state_dict()
    seen["anew"] = [{name: value.clone() for name, value in state.items()}]
    return seen


def gradients(world: int, rank: int | None) -> dict[str, Tensor]:
    """Of losses taken apart, and of the scores, to the features and to the scale, as data-parallel training sums them.

    A sum over ranks of what each made of the same loss is R times it; the scores are each rank's own.
    """
    net = Net("default", sharded=rank is not None)
    mine = [i for images in IMAGES[world] for i in images] if rank is None else IMAGES[world][rank]
    images, labels, _ = (t[mine] for t in global_batch(0, world, 2))
    features = net.trunk(images).detach().requires_grad_(True)
    losses = net.head.losses(features, labels)
    found = {}
    asked = {"ppc + 2 ce": losses.ppc + 2 * losses.ce, "total": 3 * losses.total}
    for name, value in asked.items():
        both = torch.autograd.grad(value, [features, net.head.log_scale], retain_graph=True)
        found[name], found[f"{name}, scale"] = both[0] / (world if rank is not None else 1), both[1]
    weights = torch.randn(4, CLASSES, 4, 5, generator=torch.Generator().manual_seed(5)).double()[mine]
    scores = (net.head(features) * weights).sum()
    found["scores"], found["scores, scale"] = torch.autograd.grad(scores, [features, net.head.log_scale])
    return found


def saved(world: int, rank: int) -> dict[str, object]:
    """An unsharded head's state split over ranks and gathered again; and that no rank moves when one is broken."""
    torch.manual_seed(9)
    whole = PrototypeHead(6, CLASSES, num_prototypes=3, embed_dim=6)
    for name in ("weight", "length", "usage", "idle"):
        getattr(whole, name).uniform_()
    torch.manual_seed(rank)  # another start on every rank: the first one's counts
    sharded = ShardedPrototypeHead(6, CLASSES, num_prototypes=3, embed_dim=6)
    first_rows = ranks.gathered(sharded.prototypes, sharded.class_counts)
    sharded.load_whole_state_dict(whole.state_dict())
    back = sharded.whole_state_dict()
    images, labels, _ = (t[IMAGES[world][rank]] for t in global_batch(0, world, 2))
    features = torch.cat([images, images], 1).float()
    if rank == 1:
        features = features * float("nan")
    before = {name: value.clone() for name, value in sharded.state_dict().items()}
    sharded.update(sharded.losses(features, labels))
    sizes = "not refused"
    try:
        sharded.losses(features[:, :, : 3 + (rank == 0)], labels)
    except ValueError as fault:
        sizes = str(fault)
    return {
        "start": first_rows,
        "round trip": back.keys() == whole.state_dict().keys()
        and all(torch.equal(back[name], value) for name, value in whole.state_dict().items()),
        "broken rests": all(torch.equal(value, before[name]) for name, value in sharded.state_dict().items()),
        "rows": len(sharded.prototypes),
        "sizes": sizes,
    }


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    similarity.FEWEST_COLUMNS, similarity.CPU_BAND = 10, 1  # bands of two feature rows: a tiny image has many
    for world in sorted(IMAGES, reverse=True):
        if rank >= world:
            continue
        store = f"file://{folder / f'store-{world}'}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        results = {variant: train(variant, world, rank) for variant in VARIANTS}
        found = {"results": results, "gradients": gradients(world, rank), "saved": saved(world, rank)}
        torch.save(found, folder / f"{world}-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()


@cache
def alone(variant: str, world: int) -> dict:
    with kernels.plain_only():
        return train(variant, world, None)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
