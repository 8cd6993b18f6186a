"""The sets of named arguments of `PrototypeHead`: what we found best, what the paper says, what the 2022 code does."""

from __future__ import annotations

import operator
from typing import Any

DEFAULT: dict[str, Any] = {
    "projection_norm": "channel",
    "feature_norm": "none",
    "distance": "cosine",
    "score_norm": "none",
    "score_scale": 20.0,
    "learn_scale": True,
    "assignment": "argmax",
    "update_from": "errors",
    "across_ranks": "exact",
    "start": "nested",
    "momentum": 0.97,
    "momentum_rule": "constant",
    "kappa": 0.05,
    "sinkhorn_iterations": 3,
    "small_classes": "nearest",
    "contrast_temperature": 0.1,
    "contrast_weight": 0.01,
    "contrast_siblings": True,
    "contrast_negatives": None,
    "distance_weight": 0.01,
    "reseed_after": 200,
    "align_corners": False,
    "label_sampling": "nearest-exact",
}

# Eq. (8) as it is written: each prototype moves towards the mean of its pixels, slowly.
PAPER: dict[str, Any] = DEFAULT | {"update_from": "all", "momentum": 0.999}

REFERENCE: dict[str, Any] = {
    "projection_norm": "width",
    "feature_norm": "layer_norm",
    "distance": "cosine",
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
    "small_classes": "plan",
    "contrast_temperature": 1.0,
    "contrast_weight": 0.01,
    "contrast_siblings": True,
    "contrast_negatives": None,
    "distance_weight": 0.001,
    "reseed_after": None,
    "align_corners": True,
    "label_sampling": "nearest",
}

# The reference's constants without its two accidents, so that each change is measurable alone.
REFERENCE_FIXED: dict[str, Any] = REFERENCE | {"projection_norm": "channel", "assignment": "argmax"}

PRESETS = {"default": DEFAULT, "paper": PAPER, "reference": REFERENCE, "reference_fixed": REFERENCE_FIXED}

# What a named argument may be; `assignment` may also be a function.
CHOICES: dict[str, tuple[Any, ...]] = {
    "projection_norm": ("channel", "width"),
    "feature_norm": ("none", "layer_norm"),
    "distance": ("cosine", "euclidean", "huber"),
    "score_norm": ("none", "layer_norm"),
    "update_from": ("all", "correct", "errors"),
    "across_ranks": ("exact", "average"),
    "start": ("nested", "random", "data", "truncated_normal"),
    "momentum_rule": ("constant", "bias_corrected", "count_aware"),
    "label_sampling": ("nearest-exact", "nearest"),
    "small_classes": ("nearest", "plan"),
    "assignment": ("argmax", "nearest", "kmeans", "gumbel"),
}


NUMBERS = ("kappa", "contrast_temperature", "score_scale", "contrast_weight", "distance_weight", "momentum")
COUNTS = ("sinkhorn_iterations", "contrast_negatives", "reseed_after")  # or None, where the preset may have it


def whole(name: str, value: Any) -> int:
    """`value` as an int, from whatever is one (of NumPy, a tensor).

    Raises:
        TypeError: it is none; names the argument.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, given {value!r}") from None


def count(name: str, value: Any) -> int:
    """`value` as an int of at least 1.

    Raises:
        TypeError, ValueError: it is none; names the argument.
    """
    value = whole(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, given {value}")
    return value


def number(name: str, value: Any) -> float:
    """`value` as a float, from whatever is a number.

    Raises:
        TypeError: it is none; names the argument.
    """
    try:
        if not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError, RuntimeError):  # what NumPy and PyTorch say of several numbers
        pass
    raise TypeError(f"{name} must be a number, given {value!r}")


def settle(preset: str, named: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a preset with `named` ones in place of its own.

    Raises:
        TypeError: an argument nobody knows, or one that is no number where one is due.
        ValueError: an unknown preset, or a value that means nothing; names the argument.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, given {preset!r}")
    unknown = set(named) - set(PRESETS[preset])
    if unknown:
        raise TypeError(f"PrototypeHead has no argument {', '.join(sorted(unknown))}")
    settings = PRESETS[preset] | named
    settings |= {name: number(name, settings[name]) for name in NUMBERS}
    settings |= {name: count(name, settings[name]) for name in COUNTS if settings[name] is not None}
    for name, choices in CHOICES.items():
        own = name == "assignment" and callable(settings[name])
        if settings[name] not in choices and not own:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, given {settings[name]!r}")
    for name in ("kappa", "contrast_temperature", "score_scale"):
        if not settings[name] > 0:
            raise ValueError(f"{name} must be positive, given {settings[name]}")
    for name in ("contrast_weight", "distance_weight"):
        if not settings[name] >= 0:
            raise ValueError(f"{name} must not be negative, given {settings[name]}")
    if not 0 <= settings["momentum"] <= 1:
        raise ValueError(f"momentum must lie in [0, 1], given {settings['momentum']}")
    return settings
