"""One rank of the tests in test_distributed.py, and the same training in one process for comparison.

    python distributed_worker.py RANK FOLDER

The same processes serve every world: three ranks first, then the first two of them (importing torch is the slow part).
Everything is a pure function of the variant: each rank builds the whole batch and takes its own images from it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from protoseg.method.head import PrototypeHead
from protoseg.method.losses import Losses
from protoseg.method.similarity import unit

CLASSES, STEPS, VOID = 4, 3, 255
# Images of the global batch by rank: uneven, and with three ranks the last sees nothing but void.
IMAGES = {2: [[0, 1], [2]], 3: [[0, 1], [2], [3]]}

VARIANTS: dict[str, dict] = {
    "default": {},
    "data start": {"start": "data", "momentum_rule": "bias_corrected"},
    "count aware": {"start": "data", "momentum_rule": "count_aware", "count_cap": 12.0},
    "class weights": {"class_weights": [0.5, 2.0, 1.0, 3.0], "contrast_siblings": False},
    "re-seeding": {"assignment": "nearest", "reseed_after": 1, "momentum": 0.5},
    "correct only": {"update_from": "correct", "momentum": 0.5},
    "errors": {"update_from": "errors", "momentum": 0.5, "class_weights": [0.5, 2.0, 1.0, 3.0]},
    "reference": {"preset": "reference"},
}


def named(variant: str) -> dict:
    return {"num_prototypes": 3, "embed_dim": 6, **VARIANTS[variant]}


class Net(nn.Module):
    """A 1x1 trunk and the head, with the losses as its forward: what data-parallel training wraps."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Conv2d(3, 6, 1)
        self.head = PrototypeHead(6, CLASSES, **named(variant))
        self.double()
        self.head.prototypes.copy_(unit(self.head.prototypes))  # to the last bit of float64, not of float32
        if variant == "re-seeding":  # one prototype of a class serves no pixel and is due
            self.head.usage[:, 1] = 0
            self.head.idle[:, 1] = 5

    def forward(self, images: Tensor, labels: Tensor, gumbel: Tensor) -> Losses:
        return self.head.losses(self.trunk(images), labels, gumbel=gumbel)


def global_batch(step: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and noise of all ranks. Class 3 is seen by rank 1 only, in step 1 by nobody."""
    g = torch.Generator().manual_seed(100 + step)
    count = sum(len(mine) for mine in IMAGES[world])
    images = torch.randn(count, 3, 4, 5, generator=g, dtype=torch.float64)
    labels = torch.randint(3, (count, 8, 10), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.1] = VOID
    if step != 1:
        labels[2, :3] = 3
    labels[3:] = VOID
    gumbel = -torch.empty(count, 20, 3, dtype=torch.float64).exponential_(generator=g).log()
    return images, labels, gumbel


def train(variant: str, world: int, rank: int | None) -> dict[str, list[Tensor]]:
    """A few steps of one rank (None: one process with every image). Everything worth comparing, by step."""
    net = Net(variant)
    wrapped: nn.Module = net
    if rank is not None:
        wrapped = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    mine = [i for images in IMAGES[world] for i in images] if rank is None else IMAGES[world][rank]
    seen: dict[str, list[Tensor]] = {
        name: [] for name in ("total", "ce", "ppc", "ppd", "assignment", "moving", "gradient", "prototypes", "before")
    }
    address = net.head.prototypes.data_ptr()
    for step in range(STEPS):
        images, labels, gumbel = (tensor[mine] for tensor in global_batch(step, world))
        seen["before"].append(net.head.prototypes.clone())
        losses = wrapped(images, labels, gumbel.flatten(0, 1))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        net.head.update(losses)
        assert net.head.prototypes.data_ptr() == address
        for name in ("total", "ce", "ppc", "ppd", "assignment", "moving"):
            seen[name].append(getattr(losses, name).detach().clone())
        seen["gradient"].append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
        seen["prototypes"].append(net.head.prototypes.clone())
    seen["parameters"] = [p.detach().clone() for p in net.parameters()]
    seen["buffers"] = [b.clone() for name, b in net.named_buffers()]
    return seen


def broken(world: int, rank: int, preset: str) -> bool:
    """Whether a loss that is not finite on one rank alone moves nothing on any."""
    net = Net(preset)
    images, labels, gumbel = (tensor[IMAGES[world][rank]] for tensor in global_batch(0, world))
    if rank == 1:
        images[:] = float("nan")
    before = {name: value.clone() for name, value in net.head.state_dict().items()}
    net.head.update(net(images, labels, gumbel.flatten(0, 1)))
    # The reference averages unit vectors over ranks whatever happens: the last bit may change, no more.
    slack = 1e-14 if preset == "reference" else 0.0
    return all(float((value - before[name]).abs().max()) <= slack for name, value in net.head.state_dict().items())


def nothing_labelled(world: int, rank: int) -> bool:
    """Whether a batch that is void on every rank costs nothing and moves nothing."""
    net = Net("default")
    images, labels, gumbel = (tensor[IMAGES[world][rank]] for tensor in global_batch(0, world))
    before = {name: value.clone() for name, value in net.head.state_dict().items()}
    losses = net(images, torch.full_like(labels, VOID), gumbel.flatten(0, 1))
    losses.total.backward()
    net.head.update(losses)
    same = all(torch.equal(value, before[name]) for name, value in net.head.state_dict().items())
    return same and float(losses.total.detach()) == 0 and not any(p.grad.any() for p in net.parameters())


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for world in sorted(IMAGES, reverse=True):
        if rank >= world:
            continue
        store = f"file://{folder / f'store-{world}'}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        results = {variant: train(variant, world, rank) for variant in VARIANTS}
        facts = {f"broken {preset}": broken(world, rank, preset) for preset in ("default", "reference")}
        facts["nothing labelled"] = nothing_labelled(world, rank)
        torch.save({"results": results, "facts": facts}, folder / f"{world}-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
