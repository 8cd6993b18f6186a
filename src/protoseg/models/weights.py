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

CLASSIFIERS = ("classifier.", "head.", "fc.", "decode_head.")  # what a backbone may leave in a file of weights
COUNTER = "num_batches_tracked"  # some converters leave it out, and it only matters without a momentum


@contextmanager
def from_hub(what: str) -> Iterator[None]:
    """Within: a download. What goes wrong in it is one line that says what to do instead."""
    from huggingface_hub.errors import HfHubHTTPError

    # The http library's own errors too, under whatever name it has: HfHubHTTPError derives from them.
    network: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
    try:
        yield
    except network as fault:
        reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
        raise UserError(
            f"{what} cannot be loaded from the hub ({reason}); set model.weights to a local safetensors file, "
            "or model.pretrained=false to start from random weights"
        ) from fault


def fetch(repository: str, file: str = "model.safetensors") -> str:
    """The path of a file of the hub, from its cache or downloaded.

    The hub's client tries an unreachable address for a minute; one plain request tells in a moment.

    Raises:
        UserError: the hub cannot be reached, or has no such file.
    """
    from huggingface_hub import constants, get_session, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        return cached
    with from_hub(f"{file} of {repository}"):
        get_session().head(constants.ENDPOINT, timeout=10)
        return hf_hub_download(repository, file)


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        UserError: not there, not a safetensors file (a pickle is refused, never opened), or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file; check model.weights")
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path}: only .safetensors weights are read, because a pickle can run code; convert the file first"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as fault:
        raise UserError(f"{path}: not a readable safetensors file ({fault}); copy it again") from fault


def listed(names: list[str], most: int = 4) -> str:
    """`a, b, c and 4 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def differences(missing: list[str], unexpected: list[str], reshaped: list[str]) -> str:
    """What is wrong with a state dict, in words; "" if nothing is."""
    found = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    return "; ".join(f"{len(names)} {what}: {listed(sorted(names))}" for what, names in found.items() if names)


def reshaped(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """`name (its shape), expected (shape)` of the common keys whose shapes differ."""
    return [
        f"{key} {tuple(given[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in wanted.keys() & given.keys()
        if given[key].shape != wanted[key].shape
    ]


def refuse_unfit(path: str | Path, name: str, fault: str) -> None:
    """Raise the `UserError` of a file that does not hold the weights of `name`, if there is a fault."""
    if fault:
        raise UserError(f"{path} does not hold the weights of {name}: {fault}; choose the file of this backbone")


def refuse_not_finite(state: Mapping[str, Tensor], what: str) -> None:
    """Raise a `UserError` that names the tensors with NaN or infinite values, if there are any."""
    bad = sorted(key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all())
    if bad:
        raise UserError(f"{what}: values that are not finite in {listed(bad)}")


def load_backbone_weights(
    body: nn.Module, path: str | Path, name: str, classifier: Mapping[str, Tensor] | None = None
) -> None:
    """Load a classifier's file into the backbone cut from it, in place.

    timm's feature extractors rename `stages.0` to `stages_0` or put `model.` in front, so keys are compared without
    that. Keys of `classifier`, the whole model, may be in the file without being in the backbone.

    Raises:
        UserError: weights that are missing, mis-shaped, of another model, or not finite; lists the keys.
    """
    state = read_safetensors(path)
    wanted = body.state_dict()
    spelled = {_plain(key): key for key in wanted}
    given = {spelled.get(_plain(key), key): value for key, value in state.items()}
    allowed = {_plain(key) for key in classifier or {}}
    missing = [key for key in wanted.keys() - given.keys() if not key.endswith(COUNTER)]
    extra = [key for key in given.keys() - wanted.keys() if _plain(key) not in allowed]
    extra = [key for key in extra if not key.endswith(COUNTER) and not key.startswith(CLASSIFIERS)]
    refuse_unfit(path, name, differences(missing, extra, reshaped(given, wanted)))
    refuse_not_finite(state, f"{path} is broken; choose another file")
    with torch.no_grad():
        for key in wanted.keys() & given.keys():
            wanted[key].copy_(given[key])


def load_segformer_weights(body: nn.Module, path: str | Path, name: str) -> nn.Module:
    """A SegFormer encoder with the weights of a file, in transformers' present or former spelling of the keys.

    Args:
        body: of the wanted size; gives the configuration.

    Raises:
        UserError: as `load_backbone_weights`.
    """
    import tempfile

    from transformers import SegformerModel
    from transformers.utils import logging

    refuse_not_finite(read_safetensors(path), f"{path} is broken; choose another file")
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)  # its report of the keys: ours is below
    logging.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "model.safetensors").symlink_to(Path(path).resolve())
            loaded, info = SegformerModel.from_pretrained(
                folder,
                config=body.config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                dtype=torch.float32,
            )
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
    extra = [key for key in info["unexpected_keys"] if not key.startswith(CLASSIFIERS)]
    shapes = [f"{key} {tuple(found)}, expected {tuple(shape)}" for key, found, shape in info["mismatched_keys"]]
    refuse_unfit(path, name, differences(list(info["missing_keys"]), extra, shapes))
    return loaded.train()


def _plain(key: str) -> str:
    return key.removeprefix("model.").replace(".", "_")
