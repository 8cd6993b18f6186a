"""The sets of named arguments of `PrototypeHead`: what we hold sound, and what the 2022 code does."""

from __future__ import annotations

from typing import Any

DEFAULT: dict[str, Any] = {
    "projection_norm": "channel",
    "feature_norm": "none",
    "score_norm": "none",
    "score_scale": 20.0,
    "learn_scale": True,
    "assignment": "argmax",
    "update_from": "all",
    "across_ranks": "exact",
    "start": "random",
    "momentum": 0.99,
    "momentum_rule": "constant",
    "kappa": 0.05,
    "sinkhorn_iterations": 3,
    "contrast_temperature": 0.1,
    "contrast_weight": 0.01,
    "contrast_siblings": True,
    "distance_weight": 0.01,
    "reseed_after": 200,
    "align_corners": False,
    "label_sampling": "nearest-exact",
}

REFERENCE: dict[str, Any] = {
    "projection_norm": "width",
    "feature_norm": "layer_norm",
    "score_norm": "layer_norm",
    "score_scale": 1.0,
    "learn_scale": False,
    "assignment": "gumbel",
    "update_from": "correct",
    "across_ranks": "average",
    "start": "truncated_normal",
    "momentum": 0.999,
    "momentum_rule": "constant",
    "kappa": 0.05,
    "sinkhorn_iterations": 3,
    "contrast_temperature": 1.0,
    "contrast_weight": 0.01,
    "contrast_siblings": True,
    "distance_weight": 0.001,
    "reseed_after": None,
    "align_corners": True,
    "label_sampling": "nearest",
}

# The reference's constants without its two accidents, so that each change is measurable alone.
REFERENCE_FIXED: dict[str, Any] = REFERENCE | {"projection_norm": "channel", "assignment": "argmax"}

PRESETS = {"default": DEFAULT, "reference": REFERENCE, "reference_fixed": REFERENCE_FIXED}
