"""The 2022 head as it was released, operation by operation in fp32: the baseline that speed is measured against.

Written from a description of its arithmetic, never from `src/`. It keeps what makes the release slow: the similarity of
all pixels with all prototypes is computed twice and differentiated twice, Sinkhorn runs under autograd, classes are a
Python loop with boolean masks, prototypes are re-normalised at every forward. Works on features after the projection.
For what is right, see `reference.py`; a test holds the two together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KAPPA, ITERATIONS, MOMENTUM = 0.05, 3, 0.999
CONTRAST_WEIGHT, DISTANCE_WEIGHT = 0.01, 0.001


def sinkhorn(cosine: Tensor) -> tuple[Tensor, Tensor]:
    """(n, K) cosines of one class -> (n, K) Gumbel draw as one-hot, (n,) argmax of the plan."""
    plan = torch.exp(cosine / KAPPA).t()  # K n
    K, n = plan.shape
    plan = plan / torch.sum(plan)
    for _ in range(ITERATIONS):
        plan = plan / torch.sum(plan, dim=1, keepdim=True)
        plan = plan / K
        plan = plan / torch.sum(plan, dim=0, keepdim=True)
        plan = plan / n
    plan = (plan * n).t()
    index = torch.argmax(plan, dim=1)
    return F.gumbel_softmax(plan, tau=0.5, hard=True), index


class ReferenceHead(nn.Module):
    """What the release does between projection and optimiser."""

    def __init__(self, dim: int, num_classes: int, num_prototypes: int = 10):
        super().__init__()
        self.num_classes, self.num_prototypes = num_classes, num_prototypes
        self.feature_norm = nn.LayerNorm(dim)
        self.score_norm = nn.LayerNorm(num_classes)
        start = nn.init.trunc_normal_(torch.empty(num_classes, num_prototypes, dim), std=0.02)
        self.prototypes = nn.Parameter(start, requires_grad=False)

    def learn(self, x: Tensor, scores: Tensor, labels: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """The class loop: (N, C*K) logits and (N,) target of contrast and distance; moves the prototypes.

        Args:
            x: (N, D). scores: (B, C, h, w). labels: (N,), -1 for void. masks: (N, K, C) cosines.
        """
        C, K = self.num_classes, self.num_prototypes
        predicted = torch.max(scores, 1)[1].view(-1)
        correct = labels == predicted
        logits = torch.mm(x, self.prototypes.view(-1, self.prototypes.shape[-1]).t())  # the second time
        target = labels.clone().float()
        prototypes = self.prototypes.data.clone()
        for c in range(C):
            own = masks[..., c]
            own = own[labels == c, ...]
            if own.shape[0] == 0:
                continue
            draw, index = sinkhorn(own)
            kept = correct[labels == c]
            rows = x[labels == c, ...]
            kept_draw = draw * kept[:, None].expand(-1, K)
            kept_rows = rows * kept[:, None].expand(-1, rows.shape[1])
            sums = kept_draw.transpose(0, 1) @ kept_rows
            n = torch.sum(kept_draw, dim=0)
            if torch.sum(n) > 0:
                sums = F.normalize(sums, p=2, dim=-1)
                moved = MOMENTUM * prototypes[c, n != 0, :] + (1 - MOMENTUM) * sums[n != 0, :]
                prototypes[c, n != 0, :] = moved.detach()
            target[labels == c] = index.float() + K * c
        self.prototypes = nn.Parameter(F.normalize(prototypes, p=2, dim=-1), requires_grad=False)
        return logits, target

    def similarity(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, D, h, w) -> (N, D) embedding, (N, K, C) cosines, (B, C, h, w) scores."""
        B, D, h, w = features.shape
        features = F.normalize(features, p=2, dim=-1)
        x = features.permute(0, 2, 3, 1).reshape(-1, D)
        x = F.normalize(self.feature_norm(x), p=2, dim=-1)
        self.prototypes.data.copy_(F.normalize(self.prototypes, p=2, dim=-1))
        masks = torch.einsum("nd,kmd->nmk", x, self.prototypes)
        scores = self.score_norm(torch.amax(masks, dim=1))
        return x, masks, scores.view(B, h, w, -1).permute(0, 3, 1, 2)

    def loss(self, features: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
        """Total loss of (B, D, h, w) features and (B, H, W) labels; moves the prototypes."""
        labels = torch.where(labels == ignore_index, -1, labels)
        small = F.interpolate(labels[:, None].float(), size=features.shape[2:], mode="nearest").view(-1)
        x, masks, scores = self.similarity(features)
        logits, target = self.learn(x, scores, small, masks)
        ppc = F.cross_entropy(logits, target.long(), ignore_index=-1)
        valid = target != -1
        near = torch.gather(logits[valid], 1, target[valid, None].long())
        ppd = (1 - near).pow(2).mean()
        if scores.shape[2:] != labels.shape[1:]:
            scores = F.interpolate(scores, size=labels.shape[1:], mode="bilinear", align_corners=True)
        ce = F.cross_entropy(scores, labels, ignore_index=-1)
        return ce + CONTRAST_WEIGHT * ppc + DISTANCE_WEIGHT * ppd
