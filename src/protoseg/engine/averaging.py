"""An exponential moving average of the weights, to evaluate and save instead of the last ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn


class WeightAverage(Callback):
    """theta' <- d theta' + (1 - d) theta after every optimiser step, d = min(decay, (1 + t) / (10 + t)).

    Only learned parameters are averaged. Buffers stay those of the network as it trains: prototypes and the statistics
    of batch norms are moving averages already, and counters have no mean. The average is part of the checkpoint.

    Args:
        decay: of the average; the warm-up of the formula keeps the random start out of it.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self._step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            start = self.average.get(name, parameter.detach())  # from the checkpoint where there is one
            self.average[name] = start.to(parameter.device, copy=True)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step:
            return  # a micro-batch, not a step
        self._step = trainer.global_step
        decay = min(self.decay, (1 + self._step) / (10 + self._step))
        names, parameters = zip(*pl_module.named_parameters())
        torch._foreach_lerp_([self.average[name] for name in names], list(parameters), 1 - decay)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Inside, `module`'s parameters are the average."""
        self._swap(module)
        try:
            yield
        finally:
            self._swap(module)

    @torch.no_grad()
    def _swap(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            average = self.average[name].to(parameter.device)
            self.average[name] = parameter.detach().clone()
            parameter.copy_(average)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average, self._step = dict(state_dict["average"]), state_dict["step"]
