"""ImageNet weights of a backbone: from a local safetensors file, checked key by key, or from the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from protoseg.config import UserError


@contextmanager
def from_hub(what: str, active: bool = True) -> Iterator[None]:
    """Within: a download. What goes wrong in it is one line that says what to do instead."""
    from huggingface_hub.errors import HfHubHTTPError

    # The http library's own errors too, under whatever name it has: HfHubHTTPError derives from them.
    network: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)  # type: ignore[assignment]
    try:
        yield
    except network as fault:
        if not active:
            raise
        reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
        raise UserError(
            f"{what} cannot be loaded from the hub ({reason}); set model.weights to a local safetensors file, "
            "or model.pretrained=false to start from random weights"
        ) from fault


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        UserError: not there, not a safetensors file (a pickle is refused, never opened), or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path}: only .safetensors weights are read, because a pickle can run code; convert the file first"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as fault:
        raise UserError(f"{path}: not a readable safetensors file ({fault}); copy it again") from fault


def listed(names: list[str], most: int = 6) -> str:
    """`a, b, c and 4 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def differences(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], allowed: set[str] | None = None) -> str:
    """How two state dicts differ, in words; "" if they agree. Extra keys in `allowed` are no difference."""
    missing = sorted(wanted.keys() - given.keys())
    extra = sorted(given.keys() - wanted.keys() - (allowed or set()))
    shapes = [
        f"{key} {tuple(given[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in sorted(wanted.keys() & given.keys())
        if given[key].shape != wanted[key].shape
    ]
    found = {"missing": missing, "unexpected": extra, "other shape": shapes}
    return "; ".join(f"{len(names)} {what}: {listed(names)}" for what, names in found.items() if names)


def load_backbone_weights(
    body: nn.Module, path: str | Path, name: str, *, extra: Mapping[str, Tensor] | None = None, prefix: str = ""
) -> None:
    """Load a classifier's file into the backbone cut from it, in place.

    timm's feature extractors rename `stages.0` to `stages_0` or put `model.` in front, so keys are compared without
    that. Keys of `extra` (the whole classifier) may be in the file without being in the backbone.

    Raises:
        UserError: weights that are missing, mis-shaped, of another model, or not finite; lists the keys.
    """
    given = {_plain(key.removeprefix(prefix)): value for key, value in read_safetensors(path).items()}
    state = body.state_dict()
    counters = {key for key in state if key.endswith("num_batches_tracked")}  # some converters leave these out
    wanted = {_plain(key): value for key, value in state.items() if _plain(key) in given or key not in counters}
    allowed = {_plain(key) for key in extra or {}} | {key for key in given if key.endswith("num_batches_tracked")}
    allowed |= {key for key in given if key.startswith(("classifier_", "head_", "fc_", "decode_head_"))}
    fault = differences(given, wanted, allowed)
    if fault:
        raise UserError(f"{path} does not hold the weights of {name}: {fault}; choose the file of this backbone")
    bad = sorted(key for key in wanted if given[key].is_floating_point() and not given[key].isfinite().all())
    if bad:
        raise UserError(f"{path} holds values that are not finite in {listed(bad)}; choose another file")
    with torch.no_grad():
        for key, value in state.items():
            if _plain(key) in wanted:
                value.copy_(given[_plain(key)])


def _plain(key: str) -> str:
    return key.removeprefix("model.").replace(".", "_")
