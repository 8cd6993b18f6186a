"""`SegmentationModule`: the training step, the line that moves the prototypes, and validation."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from protoseg.config import Evaluation, Optim, UserError
from protoseg.engine.optim import build_optimizer, build_schedule
from protoseg.engine.scoring import score
from protoseg.method.losses import Losses
from protoseg.models.segmenter import Segmenter

PATIENCE = 10  # optimiser steps in a row without a finite loss or gradient after which the run stops
Batch = Mapping[str, Any]


class SegmentationModule(LightningModule):
    """What Lightning's `Trainer` needs to know of a `Segmenter`.

    The prototypes move once per optimiser step, after the last backward (which still needs the old ones) and before
    the optimiser, with the micro-batches of the whole step: sums and counts of all of them, as if they were one batch.
    Later would be wrong too: what is saved at the end of a step must hold the prototypes of that step.

    Gradients of a step are the plain mean over its micro-batches. A step whose gradient is not finite counts as a
    gradient of zero and moves no prototype; `PATIENCE` of them in a row end the run.

    Args:
        model: the network.
        optim: optimiser and schedule.
        steps: T, the length of the run in optimiser steps.
        seed: dropout, drop-path and sampled assignments are a function of it, the step and the rank.
        evaluation: how validation segments an image.
    """

    failures: Tensor
    longest: Tensor

    def __init__(
        self, model: Segmenter, optim: Optim, steps: int, *, seed: int = 0, evaluation: Evaluation | None = None
    ):
        super().__init__()
        self.model = model
        self.optim = optim
        self.steps = steps
        self.seed = seed
        self.evaluation = Evaluation() if evaluation is None else evaluation
        self.parts: dict[str, Tensor] = {}  # of the last optimiser step, on the device: reading them is a sync
        self.rate = 0.0  # the learning rate of that step, of the first parameter group
        self._micro_batches: list[Losses] = []
        # counted on the device and looked at now and then: a look at every step would stop a GPU at every step
        self.register_buffer("failures", torch.zeros((), dtype=torch.int64))
        self.register_buffer("longest", torch.zeros((), dtype=torch.int64), persistent=False)
        self._noted: Tensor | None = None  # `longest` on its way to the CPU

    def compile_network(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Let torch.compile fuse backbone and decoder from the first training step on; the head has its own kernels.

        In place: names of parameters, and so what is saved, stay as they are. Validation, whose pictures may have any
        size, goes on without. Dropout is drawn by another generator than without the compiler.

        Args:
            backend: of torch.compile.

        Raises:
            UserError: no C++ compiler for a network on the CPU.
        """
        compilers = (os.environ.get("CXX", "g++"), "clang++")
        if backend == "inductor" and not torch.cuda.is_available() and not any(map(shutil.which, compilers)):
            raise UserError(f"compile needs a C++ compiler ({', '.join(compilers)}); install one or set compile false")
        for part in (self.model.backbone, self.model.decoder):
            part.compile(backend=backend, dynamic=False)

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.optim)
        schedule = build_schedule(optimizer, self.optim, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """A run that is continued to more steps than it had goes by the new schedule from its next step on."""
        schedule = self.lr_schedulers()
        if isinstance(schedule, LambdaLR):
            known = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas)
            for group, peak, factor in known:
                group["lr"] = peak * factor(schedule.last_epoch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        torch.manual_seed(step_seed(self.seed, self.global_step, len(self._micro_batches), self.global_rank))
        losses = self.model.losses(batch["image"], batch["label"])
        self._micro_batches.append(losses)
        return losses.total

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """After the backward of the last micro-batch and the unscaling of AMP, before clipping and the optimiser."""
        batches, self._micro_batches = self._micro_batches, []
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)  # the same on all ranks, so they decide alike
        finite = norm.isfinite()
        zero_unless_(finite, gradients)
        # where AMP will skip the step, the loss is finite but the gradient is not: the prototypes skip it as well
        self.model.update([replace(losses, total=losses.total.detach() + 0 * norm) for losses in batches])
        self.parts = mean_parts([losses.parts for losses in batches]) | {"grad_norm": norm}
        self.rate = optimizer.param_groups[0]["lr"]
        self._count_failures(batches, finite)

    def _count_failures(self, batches: list[Losses], finite: Tensor) -> None:
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            # infinite gradients are how AMP finds its scale; only the losses tell
            finite = torch.stack([losses.total.detach().isfinite() for losses in batches]).all()
        self.failures.copy_(torch.where(finite, 0, self.failures + 1))
        self.longest.copy_(torch.maximum(self.longest, self.failures))
        if self._longest_known() >= PATIENCE:
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in self.parts.items())
            raise UserError(
                f"no finite loss and gradient for {PATIENCE} steps in a row, until step {self.global_step} ({values}); "
                "lower optim.lr, lengthen optim.warmup_steps, set optim.clip or choose precision 32-true"
            )

    def _longest_known(self) -> int:
        """`longest` without waiting for a GPU: as it was `PATIENCE` steps ago, or a few more."""
        if self.device.type == "cpu":
            return int(self.longest)
        if self.global_step % PATIENCE:
            return 0
        if self._noted is None:
            self._noted = torch.zeros_like(self.longest, device="cpu").pin_memory()
        known = int(self._noted)
        self._noted.copy_(self.longest, non_blocking=True)
        return known

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Metrics over a whole split, the same for any number of ranks.

        Args:
            batches: of one image each: `image` (1, 3, h, w), `label` (1, H, W) at original size, `name`.

        Returns:
            `val/miou`, `val/pixel_accuracy`, `val/mean_accuracy`, `val/classes` (how many the mean is over); with a
            prototype head also `prototypes/pairwise_cosine` and `prototypes/used`.
        """
        with torch.compiler.set_stance("force_eager"):
            scores = score(self.model, batches, self.evaluation)
        overlap = scores.overlap
        metrics = {
            "val/miou": overlap.miou,
            "val/pixel_accuracy": overlap.pixel_accuracy,
            "val/mean_accuracy": overlap.mean_accuracy,
            "val/classes": float(overlap.averaged),
        }
        return metrics | {f"prototypes/{name}": value for name, value in scores.distinctness.items()}


def step_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """A seed for everything random in one forward pass, so that a resumed run draws what the whole run would have.

    The parts are mixed by multiplication with large odd constants (as in SplitMix64): neighbouring steps and ranks
    must not have neighbouring seeds, which some generators answer with related streams.
    """
    value = seed
    for part in (step, micro_batch, rank):
        value = ((value ^ (value >> 31)) * 0xBF58476D1CE4E5B9 + part * 0x9E3779B97F4A7C15 + 1) % 2**64
    return value ^ (value >> 29)


def zero_unless_(finite: Tensor, gradients: list[Tensor]) -> None:
    """Set all gradients to 0 where `finite`, a single bool on their device, is false; else they keep their bits.

    As whole numbers, for which 0 times NaN is 0: that is a few kernels for all parameters, not one for each.
    """
    same = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for size, kind in same.items():
        bits = [gradient.view(kind) for gradient in gradients if gradient.element_size() == size]
        if bits:
            torch._foreach_mul_(bits, finite.to(kind))


def mean_parts(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each part over micro-batches, on the device."""
    return {name: torch.stack([part[name].float() for part in parts]).mean() for name in parts[0]}
