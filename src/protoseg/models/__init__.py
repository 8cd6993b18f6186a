"""Networks: settings -> `Segmenter`. Libraries of models are imported only by the builder that needs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from protoseg.config import Head, Model, UserError
from protoseg.method.head import PrototypeHead
from protoseg.method.presets import PRESETS
from protoseg.models.networks import NETWORKS
from protoseg.models.segmenter import Segmenter, count_parameters
from protoseg.models.softmax_head import CosineHead, SoftmaxHead

__all__ = ["HEADS", "NETWORKS", "Segmenter", "assemble", "build", "build_head", "count_parameters"]


def build(model: Model, head: Head, num_classes: int, ignore_index: int | None = None) -> Segmenter:
    """The network of the settings, with random weights unless `model.pretrained` or `model.weights` say otherwise.

    Raises:
        UserError: settings that do not fit together, weights that do not fit or cannot be had; one line each.
    """
    if model.network not in NETWORKS:
        raise UserError(f"model.network {model.network!r} is unknown; choose one of {', '.join(NETWORKS)}")
    if model.network != "timm" and (model.backbone or model.decoder != Model.decoder):
        raise UserError(
            f"model.network {model.network} has its own backbone and decoder; "
            "for others choose model.network timm, or leave model.backbone and model.decoder out"
        )
    backbone, decoder = NETWORKS[model.network](model)
    return assemble(backbone, decoder, model, head, num_classes, ignore_index)


def assemble(
    backbone: Any, decoder: Any, model: Model, head: Head, num_classes: int, ignore_index: int | None = None
) -> Segmenter:
    """A `Segmenter` from a backbone and a decoder that are already there, for networks of your own."""
    with torch.random.fork_rng(devices=[]):  # what one head draws more than another must not move what comes after it
        classifier = build_head(head, decoder.out_channels, num_classes, ignore_index)
    return Segmenter(
        backbone,
        decoder,
        classifier,
        backbone.mean,
        backbone.std,
        auxiliary_weight=model.auxiliary_weight,
        freeze_backbone=model.freeze_backbone,
        settings=(model, written_out(head, embed_dim=classifier.embed_dim)),
    )


def written_out(head: Head, **known: Any) -> Head:
    """`head` with what its preset says today, or `known`, in place of None: new defaults must not change a saved model,
    nor a run that began before them."""
    known |= PRESETS[head.preset] if head.kind == "prototype" else {}
    unsaid = [name for name, value in dataclasses.asdict(head).items() if value is None]
    return dataclasses.replace(head, **{name: known[name] for name in unsaid if name in known})


def build_head(head: Head, in_channels: int, num_classes: int, ignore_index: int | None = None) -> nn.Module:
    """The classifier of the settings, for features of `in_channels`.

    Raises:
        UserError: what the head's own arguments refuse.
    """
    if head.kind not in HEADS:
        raise UserError(f"head.kind {head.kind!r} is unknown; choose one of {', '.join(HEADS)}")
    if num_classes < 1:
        raise UserError(f"a head needs at least one class, given {num_classes}")
    try:
        return HEADS[head.kind](head, in_channels, num_classes, ignore_index)
    except (TypeError, ValueError) as fault:
        raise UserError(f"head.{head.kind}: {fault}; change the head settings") from fault


def _prototype(head: Head, in_channels: int, num_classes: int, ignore_index: int | None) -> nn.Module:
    given = {name: value for name, value in dataclasses.asdict(head).items() if value is not None and name != "kind"}
    return PrototypeHead(in_channels, num_classes, ignore_index=ignore_index, **given)


def _softmax(head: Head, in_channels: int, num_classes: int, ignore_index: int | None) -> nn.Module:
    return SoftmaxHead(in_channels, num_classes, ignore_index=ignore_index, class_weights=head.class_weights)


def _softmax_projected(head: Head, in_channels: int, num_classes: int, ignore_index: int | None) -> nn.Module:
    if head.projection == "none":
        raise ValueError('projection="none" makes it the plain softmax head')
    return SoftmaxHead(
        in_channels,
        num_classes,
        projection=head.projection,
        embed_dim=_embed_dim(head, in_channels),
        ignore_index=ignore_index,
        class_weights=head.class_weights,
    )


def _cosine(
    head: Head, in_channels: int, num_classes: int, ignore_index: int | None, num_vectors: int = 1
) -> nn.Module:
    given = {"score_scale": head.score_scale, "learn_scale": head.learn_scale}
    return CosineHead(
        in_channels,
        num_classes,
        num_vectors=num_vectors,
        projection=head.projection,
        embed_dim=_embed_dim(head, in_channels),
        ignore_index=ignore_index,
        class_weights=head.class_weights,
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )


def _subcentres(head: Head, in_channels: int, num_classes: int, ignore_index: int | None) -> nn.Module:
    return _cosine(head, in_channels, num_classes, ignore_index, head.num_prototypes)


def _embed_dim(head: Head, in_channels: int) -> int | None:
    """The width the prototype head would take under the same settings: a baseline must not differ in it."""
    if head.embed_dim is None and head.preset.startswith("reference"):
        return in_channels
    return head.embed_dim


HEADS: dict[str, Callable[[Head, int, int, int | None], nn.Module]] = {
    "prototype": _prototype,
    "softmax": _softmax,
    "softmax_projected": _softmax_projected,
    "cosine": _cosine,
    "cosine_subcentres": _subcentres,
}
