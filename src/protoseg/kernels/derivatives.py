"""Backwards written by hand have no backward of their own: who asks for one is told so instead of being given zeros."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError(
            "the head's fast path has no second derivative; take its losses within protoseg.kernels.plain_only()"
        )


def first_only(backward: Backward) -> Backward:
    """Decorates the `backward` of a Function whose gradient depends on its inputs.

    `once_differentiable` of PyTorch refuses only where an incoming gradient itself asks for a gradient; that of a loss
    never does, and under `create_graph=True` the result would pass for a constant.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return found
        return tuple(None if g is None else _Refused.apply(g.detach().requires_grad_(True)) for g in found)

    return wrapped
