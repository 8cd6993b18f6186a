"""Weights from a file are checked key by key; a hub that is away is one line; a pickle is never opened."""

import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from protoseg.config import Head, Model, UserError
from protoseg.models import build
from protoseg.models.backbones import SegformerPyramid, TimmPyramid

SHARED = Path(os.environ.get("PROTOSEG_SHARED", Path(__file__).parents[3] / "shared"))
MOBILENET = SHARED / "weights" / "mobilenetv2_100.safetensors"
SMALL_MIT = {"widths": (8, 16, 16, 16), "depths": (1, 1, 1, 1), "heads": (1, 1, 2, 2)}


@pytest.fixture(params=["test_resnet", "test_convnext", "test_vit"])  # three ways of timm to spell the same keys
def classifier(request, tmp_path):
    torch.manual_seed(1)
    model = timm.create_model(request.param).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return request.param, tmp_path / "weights.safetensors", model


def test_a_file_gives_the_features_of_its_model(classifier):
    name, path, model = classifier
    torch.manual_seed(2)
    loaded = TimmPyramid(name, weights=str(path)).eval()
    other = TimmPyramid(name).eval()
    native = {key.replace(".", "_"): value for key, value in model.state_dict().items()}
    for key, value in loaded.body.state_dict().items():
        assert torch.equal(value, native[key.removeprefix("model.").replace(".", "_")])
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert not torch.equal(loaded(images)[-1], other(images)[-1])
        if name == "test_resnet":
            assert torch.equal(loaded(images)[-1], model.forward_features(images))


def test_broken_files_are_refused_with_the_keys(classifier, tmp_path):
    name, path, _ = classifier
    state = load_file(path)
    key = next(key for key, value in state.items() if value.dim() == 4)
    bad = {
        f"1 missing: .*{key.split('.')[-1]}": {k: v for k, v in state.items() if k != key},
        "1 of another shape: .*expected": {**state, key: state[key][:1].clone()},
        "1 unexpected: other.weight": {**state, "other.weight": torch.zeros(1)},
        f"not finite in {key}": {**state, key: torch.full_like(state[key], torch.nan)},
    }
    for message, content in bad.items():
        save_file(content, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=message) as error:
            TimmPyramid(name, weights=str(tmp_path / "bad.safetensors"))
        assert "bad.safetensors" in str(error.value)


def test_a_file_of_another_backbone_is_refused(classifier):
    _, path, _ = classifier
    with pytest.raises(UserError, match=r"does not hold the weights of tiny: .*missing.*unexpected"):
        build(Model(network="tiny", weights=str(path)), Head(), 3)


def test_segformer_reads_the_published_spelling(tmp_path):
    source = SegformerPyramid(**SMALL_MIT).eval()
    source.body.save_pretrained(tmp_path)  # writes the keys as the hub has them
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    assert not state.keys() & source.body.state_dict().keys()
    loaded = SegformerPyramid(**SMALL_MIT, weights=str(path)).eval()
    images = torch.rand(1, 3, 64, 32)
    for a, b in zip(source(images), loaded(images)):
        assert_close(a, b)
    save_file({**state, "classifier.weight": torch.zeros(2)}, path)
    SegformerPyramid(**SMALL_MIT, weights=str(path))
    state.pop(next(key for key in state if "patch_embeddings" in key))
    save_file(state, path)
    with pytest.raises(UserError, match=r"1 missing: stages.0.patch_embeddings"):
        SegformerPyramid(**SMALL_MIT, weights=str(path))


class Canary:
    def __reduce__(self):
        return (open, ("canary", "w"))


def test_pickles_damage_and_absence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("weights.pth", "weights.safetensors"):
        Path(name).write_bytes(pickle.dumps(Canary()))
        with pytest.raises(UserError, match=name):
            build(Model(weights=name), Head(), 3)
    assert not Path("canary").exists()
    Path("huge.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match=r"huge.safetensors: not a readable safetensors file"):
        build(Model(weights="huge.safetensors"), Head(), 3)
    with pytest.raises(UserError, match=r"nowhere.safetensors: no such weights file"):
        build(Model(weights="nowhere.safetensors"), Head(), 3)


@pytest.mark.parametrize("network", ["mobilenetv2_light", "segformer_mit_b4"])
@pytest.mark.parametrize("trouble", ["refused", "offline"])
def test_an_unreachable_hub_is_one_line_at_once(network, trouble, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", trouble == "offline")
    if network == "segformer_mit_b4":
        monkeypatch.setattr(
            "protoseg.models.networks.SegformerPyramid", lambda *a, **k: SegformerPyramid(**SMALL_MIT, pretrained=True)
        )
    with pytest.raises(
        UserError, match=r"cannot be loaded from the hub .*; set model.weights .* or model.pretrained=false"
    ) as error:
        build(Model(network=network, pretrained=True), Head(), 3)
    assert "\n" not in str(error.value)
    assert ("refused" in str(error.value)) == (trouble == "refused")


def test_weights_in_the_cache_need_no_hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    model = timm.create_model("test_resnet")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(tmp_path / "model.safetensors"))
    backbone = TimmPyramid("test_resnet", pretrained=True)
    assert torch.equal(next(backbone.body.parameters()), next(model.parameters()))


@pytest.mark.skipif(not MOBILENET.is_file(), reason=f"no ImageNet MobileNetV2 at {MOBILENET}")
def test_the_shared_mobilenet_equals_timms_own_loading():
    segmenter = build(Model(network="mobilenetv2_light", weights=str(MOBILENET)), Head(), 11).eval()
    overlay = {"file": str(MOBILENET)}
    theirs = timm.create_model(
        "mobilenetv2_100", pretrained=True, features_only=True, out_indices=(1, 2, 3, 4), pretrained_cfg_overlay=overlay
    ).eval()
    theirs = theirs.to(memory_format=torch.channels_last)  # as a segmenter is: another layout rounds otherwise
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(segmenter.backbone(images), theirs(images)):
            assert torch.equal(a, b)
