"""Which parameter learns how fast: parameter groups, the optimiser, and its schedule in optimiser steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from protoseg.config import Optim, UserError

# Names that weight decay leaves alone even where they have two axes or more, as in the papers of the networks:
# position embeddings and relative position biases (Swin), class tokens (ViT).
UNDECAYED_NAMES = ("pos_embed", "position_embedding", "relative_position_bias", "cls_token")


def build_optimizer(segmenter: nn.Module, optim: Optim) -> Optimizer:
    """AdamW or SGD over the groups of `parameter_groups`.

    Args:
        segmenter: a module whose `backbone`, where it has one, learns at `optim.lr` and all else at
            `optim.lr * optim.head_lr`.
        optim: the settings.

    Raises:
        UserError: a number out of range.
    """
    check(optim)
    groups = parameter_groups(segmenter, optim)
    if optim.name == "sgd":
        return SGD(groups, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)
    return AdamW(groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), weight_decay=optim.weight_decay)


def parameter_groups(segmenter: nn.Module, optim: Optim) -> list[dict[str, Any]]:
    """At most four groups: backbone or not, decayed or not; each has a `name`.

    Not decayed, unless `optim.decay_norm`: parameters with one axis or none (norms, biases, the score scale) and those
    of `UNDECAYED_NAMES`. Prototypes are buffers, in no group. A parameter used twice is listed at its first name.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in segmenter.named_parameters():
        if not parameter.requires_grad:
            continue
        backbone = name.split(".")[0] == "backbone"
        decayed = optim.decay_norm or not (parameter.ndim <= 1 or any(part in name for part in UNDECAYED_NAMES))
        key = ("backbone" if backbone else "head") + ("" if decayed else "_no_decay")
        group = groups.setdefault(
            key,
            {
                "params": [],
                "name": key,
                "lr": optim.lr * (1.0 if backbone else optim.head_lr),
                "weight_decay": optim.weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_schedule(optimizer: Optimizer, optim: Optim, steps: int) -> LambdaLR:
    """The schedule of `factor`, to be stepped once per optimiser step. `min_lr` is the same in every group.

    Args:
        optimizer: from `build_optimizer`; each group's `lr` is its peak.
        optim: the settings.
        steps: T, the length of the run in optimiser steps.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]
    return LambdaLR(optimizer, [schedule_of(optim, steps, peak) for peak in peaks])


def schedule_of(optim: Optim, steps: int, peak: float) -> Callable[[int], float]:
    """step -> what `peak` is multiplied by."""

    def multiplier(step: int) -> float:
        return learning_rate(step, optim, steps, peak) / peak if peak else 0.0

    return multiplier


def learning_rate(step: int, optim: Optim, steps: int, peak: float) -> float:
    """The learning rate at an optimiser step, t = 0 being the first.

    - `poly`: (peak - min_lr) * (1 - t/T)^power + min_lr, as MMSegmentation; T is the whole run, warm-up included;
    - `cosine`: (peak - min_lr) * (1 + cos(pi t/T)) / 2 + min_lr;
    - `constant`: peak;
    - the first `warmup_steps` W times 1 - (1 - t/W) * (1 - warmup_ratio): linear from `warmup_ratio` (MMSegmentation's
      `linear` warm-up, which multiplies the schedule instead of postponing it).

    Args:
        step: t, held at T after the end.
        optim: the settings.
        steps: T.
        peak: the group's learning rate.
    """
    past = min(step / steps, 1.0)
    low = min(optim.min_lr, peak)
    if optim.schedule == "poly":
        rate = (peak - low) * (1 - past) ** optim.power + low
    elif optim.schedule == "cosine":
        rate = (peak - low) * (1 + math.cos(math.pi * past)) / 2 + low
    else:
        rate = peak
    if step < optim.warmup_steps:
        rate *= 1 - (1 - step / optim.warmup_steps) * (1 - optim.warmup_ratio)
    return rate


def check(optim: Optim) -> None:
    """Raises: UserError: a number that no optimiser could mean."""
    for name in (
        "lr",
        "head_lr",
        "weight_decay",
        "momentum",
        "min_lr",
        "warmup_steps",
        "warmup_ratio",
        "clip",
        "power",
    ):
        value = getattr(optim, name)
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"optim.{name} must be a finite number, 0 or more; given {value}")
    if optim.min_lr > optim.lr:
        raise UserError(f"optim.min_lr {optim.min_lr} is above optim.lr {optim.lr}; the schedule could not fall to it")
