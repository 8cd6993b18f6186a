"""What the tests of the method share: a head in float64, a small batch, the head's weights as the oracles want them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from oracles import default as oracle
from oracles import reference
from protoseg.method.head import PrototypeHead

VOID = 255


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(
    channels: int, classes: int, size=(2, 4, 6), label_size=None, seed: int = 0, void: float = 0.1, dtype=torch.float64
) -> tuple[Tensor, Tensor]:
    """Random features (B, channels, h, w) and labels (B, H, W); this share of the labels is 255."""
    g = seeded(seed)
    features = torch.randn(size[0], channels, *size[1:], generator=g, dtype=torch.float64).to(dtype)
    shape = (size[0], *(label_size or size[1:]))
    labels = torch.randint(classes, shape, generator=g)
    return features, torch.where(torch.rand(shape, generator=g) < void, VOID, labels)


def build(*args, seed: int = 0, **named) -> PrototypeHead:
    """A head in float64 whose prototypes are unit to the last bit of float64."""
    torch.manual_seed(seed)
    head = PrototypeHead(*args, **named).double()
    with torch.no_grad():
        head.prototypes.copy_(reference.unit(head.prototypes))
        for module in head.modules():  # norms start as the identity; move them so that forgetting one shows
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(0.3 * torch.randn(module.weight.shape, generator=seeded(seed + 1)))
                module.bias.add_(0.3 * torch.randn(module.bias.shape, generator=seeded(seed + 2)))
    return head


def convolutions(head: PrototypeHead) -> list[tuple[Tensor, Tensor]]:
    found = [m for m in head.projection.modules() if isinstance(m, nn.Conv2d)]
    return [(m.weight.detach()[:, :, 0, 0], m.bias.detach()) for m in found]


def reference_weights(head: PrototypeHead) -> reference.Weights:
    feature, score = head.feature_norm, head.score_norm
    return reference.Weights(
        convolutions(head),
        (feature.weight.detach(), feature.bias.detach()),
        (score.weight.detach(), score.bias.detach()),
    )


def default_step(head: PrototypeHead, features: Tensor, labels: Tensor, **named) -> oracle.Step:
    """The oracle of the sound way, told the head's settings."""
    return oracle.step(
        features,
        torch.where(labels == head.ignore_index, -1, labels),
        head.prototypes,
        scale=float(head.log_scale.detach().exp()),
        tau=head.contrast_temperature,
        contrast_weight=head.contrast_weight,
        distance_weight=head.distance_weight,
        projection=convolutions(head),
        kappa=head.kappa,
        iterations=head.sinkhorn_iterations,
        siblings=head.contrast_siblings,
        class_weights=head.class_weights,
        align_corners=head.align_corners,
        **named,
    )
