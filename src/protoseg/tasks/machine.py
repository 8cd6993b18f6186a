"""Where a run happens: processor, processes, and how the global batch falls to them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from protoseg.config import Recipe, UserError


@dataclass(frozen=True)
class Machine:
    """Where a run happens.

    Args:
        accelerator: `cpu` or `gpu`.
        devices, nodes: processes per machine, machines.
        rank: of this process. Lightning starts the other processes itself unless torchrun or SLURM has.
        micro_batch: images per device and forward pass.
        accumulate: micro-batches per optimiser step.
    """

    accelerator: str
    devices: int
    nodes: int
    rank: int
    micro_batch: int
    accumulate: int

    @property
    def world(self) -> int:
        return self.devices * self.nodes

    @property
    def device(self) -> torch.device:
        """Where this rank's network is."""
        return torch.device("cpu") if self.accelerator == "cpu" else torch.device("cuda", self.rank % self.devices)

    @classmethod
    def of(cls, recipe: Recipe) -> Machine:
        """The machine a recipe asks for, refused where it is not there or the global batch does not divide.

        Raises:
            UserError: no GPU, too few of them, or batch_size != devices * nodes * micro_batch * accumulate.
        """
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        accelerator = recipe.accelerator if recipe.accelerator != "auto" else ("gpu" if gpus else "cpu")
        if accelerator == "gpu" and not gpus:
            raise UserError("accelerator is gpu but torch sees no CUDA device; choose cpu, or check nvidia-smi")
        devices, nodes = recipe.devices, recipe.nodes
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun decides how many there are
            devices = int(os.environ["LOCAL_WORLD_SIZE"])
            nodes = int(os.environ["WORLD_SIZE"]) // devices
        devices = devices or gpus or 1
        if devices < 0 or nodes < 1:
            raise UserError(f"devices {recipe.devices} and nodes {recipe.nodes} must be at least 1 (0 devices: all)")
        if accelerator == "gpu" and devices > gpus:
            raise UserError(f"devices is {devices} but torch sees {gpus} GPU(s); lower devices or use more nodes")
        if recipe.precision == "16-mixed" and accelerator == "cpu":
            raise UserError("precision 16-mixed needs a GPU; choose bf16-mixed or 32-true")
        world = devices * nodes
        micro = recipe.micro_batch or recipe.batch_size // world
        if micro < 1 or recipe.batch_size < 1 or recipe.batch_size % (micro * world):
            raise UserError(
                f"batch_size {recipe.batch_size} is the global batch and must be devices × nodes × micro_batch × a "
                f"whole number of accumulated micro-batches; given {devices} × {nodes} × {micro}. "
                "Change batch_size, micro_batch or devices"
            )
        return cls(accelerator, devices, nodes, global_rank(devices), micro, recipe.batch_size // (micro * world))


def global_rank(devices: int) -> int:
    """Of this process among all of the run, before they have met; 0 where nobody says.

    torchrun sets RANK and srun SLURM_PROCID; processes that Lightning starts know LOCAL_RANK, and NODE_RANK on several
    machines.
    """
    known = os.environ
    if "RANK" not in known and ("LOCAL_RANK" in known or "NODE_RANK" in known):
        return int(known.get("NODE_RANK", 0)) * devices + int(known.get("LOCAL_RANK", 0))
    return int(rank_zero_only.rank or 0)
