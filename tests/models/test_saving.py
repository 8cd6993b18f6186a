"""A saved folder gives the same model back, whole, or a reason why not."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from protoseg.config import Head, Model, UserError
from protoseg.method.head import PrototypeHead
from protoseg.method.presets import PRESETS
from protoseg.models import HEADS, Segmenter, build
from protoseg.models.saving import load, save

META = {"names": ["road", "<b>sky</b>", "arbre é"], "palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]], "base_size": 360}


def make(kind="prototype", **model):
    torch.manual_seed(3)
    settings = Model(network="tiny", decoder_channels=16, **model)
    return build(settings, Head(kind=kind, num_prototypes=2, embed_dim=8, class_weights=(1.0, 2.0, 0.5)), 3).eval()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save(make(), tmp_path_factory.mktemp("saved") / "best", META)


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "best"))


def rewrite(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def reconfigure(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("preset", ["default", "reference"])
def test_a_change_of_the_defaults_does_not_change_a_saved_model(preset, tmp_path, monkeypatch):
    torch.manual_seed(0)
    segmenter = build(Model(network="tiny"), Head(preset=preset), 3).eval()
    images = torch.rand(1, 3, 32, 32)
    folder = save(segmenter, tmp_path / "model", META)
    before, momentum = segmenter(images), PRESETS[preset]["momentum"]
    assert load(folder)[0].settings[1].embed_dim == segmenter.head.embed_dim
    for name, other in {"distance": "huber", "momentum": 0.5, "score_scale": 3.0, "kappa": 1.0}.items():
        monkeypatch.setitem(PRESETS[preset], name, other)
    loaded = load(folder)[0]
    assert torch.equal(loaded(images), before)
    assert (loaded.head.distance, loaded.head.momentum, loaded.head.kappa) == ("cosine", momentum, 0.05)


@pytest.mark.parametrize("kind", HEADS)
def test_the_same_outputs_and_settings_come_back(kind, tmp_path):
    segmenter = make(kind, auxiliary_weight=0.4)
    segmenter.mean.fill_(0.25)
    images = torch.rand(1, 3, 33, 40)
    segmenter.train().losses(images.repeat(2, 1, 1, 1), torch.zeros(2, 33, 40, dtype=torch.int64))  # batch statistics
    loaded, meta = load(save(segmenter.eval(), tmp_path / "a" / "best", META))
    assert torch.equal(loaded(images), segmenter(images))
    assert loaded.settings == segmenter.settings
    assert not loaded.training
    assert meta["names"] == tuple(META["names"])
    assert meta["palette"] == ((1, 2, 3), (4, 5, 6), (7, 8, 9))
    assert (meta["base_size"], meta["ignore_index"]) == (360, 255)
    assert sorted(p.name for p in (tmp_path / "a" / "best").iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["best"]


def test_channels_last_weights_are_saved_as_plain_ones(tmp_path):
    segmenter = make().to(memory_format=torch.channels_last)
    loaded, _ = load(save(segmenter, tmp_path / "best", META))
    for key, value in segmenter.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key])


def test_no_path_of_this_machine_is_saved(tmp_path):
    segmenter = make()
    model, head = segmenter.settings
    segmenter.settings = (dataclasses.replace(model, weights="/home/somebody/backbone.safetensors"), head)
    text = (save(segmenter, tmp_path / "best", META) / "config.json").read_text()
    assert "somebody" not in text
    assert "backbone.safetensors" in text


def test_loading_never_downloads(folder):
    reconfigure(folder, lambda c: c["model"].update(network="mobilenetv2_light", pretrained=True, weights="/nowhere"))
    with pytest.raises(UserError, match=r"does not fit its config.json"):  # built without asking for either
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("head.prototypes"), "head.prototypes is missing"),
        (
            lambda s: [s.pop(k) for k in list(s) if "prototypes" in k or "stem" in k],
            "head.prototypes is missing; 7 missing",
        ),
        (lambda s: s.update({"evil.weight": torch.zeros(2)}), "1 unexpected: evil.weight"),
        (
            lambda s: s.update({"head.prototypes": torch.zeros(4, 2, 8)}),
            r"1 of another shape: head.prototypes \(4, 2, 8\), expected \(3, 2, 8\)",
        ),
        (lambda s: s["head.prototypes"].fill_(torch.nan), "not finite in head.prototypes"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=2), "expected format 1, given 2"),
        (lambda c: c.pop("head"), "'head' must be a dict"),
        (lambda c: c["head"].update(class_path="os.system"), "Head has no setting class_path"),
        (lambda c: c["model"].update(network="os.system"), "unknown"),
        (lambda c: c["model"].update(network="timm", backbone="resnet18", decoder="evil"), "unknown"),
        (lambda c: c["meta"].update(names=["a"], palette=None), "needs 1 numbers|does not fit"),
        (lambda c: c["meta"].update(names=[]), "names must list"),
        (lambda c: c["meta"].update(palette=[[1, 2, 300]] * 3), "palette must be 3 colours"),
        (lambda c: c["meta"].update(ignore_index="x"), "ignore_index must be"),
        (lambda c: c.update(mean=[0, 0]), "'mean' must be three numbers"),
        (lambda c: c.update(std=[0, 1, 1]), "'std' must not be 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(folder, change, message):
    reconfigure(folder, change)
    with pytest.raises(UserError, match=message):
        load(folder)


class Canary:
    def __reduce__(self):
        return (open, ("canary", "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "last.ckpt", "model.pt"])
def test_pickles_are_refused_unread(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Canary()))
    with pytest.raises(UserError, match=f"{name} is a pickle"):
        load(folder)
    (folder / name).rename(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"not a readable safetensors file"):
        load(folder)
    assert not (folder / "canary").exists()


def test_missing_and_damaged_files(folder, tmp_path):
    with pytest.raises(UserError, match=r"no model.safetensors here; .*best"):
        load(tmp_path / "nowhere")
    content = (folder / "model.safetensors").read_bytes()
    for cut in range(0, len(content), len(content) // 7):
        (folder / "model.safetensors").write_bytes(content[:cut])
        with pytest.raises(UserError, match=r"not a readable safetensors file"):
            load(folder)
    (folder / "model.safetensors").write_bytes(content)
    for text in ("{", "[]", "[" * 100_000, "\xff"):
        (folder / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=r"config.json"):
            load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json: not there"):
        load(folder)


def test_saving_again_replaces_the_model_and_leaves_other_files(folder):
    (folder / "notes.txt").write_text("mine")
    segmenter = make("softmax")
    save(segmenter, folder, META)
    assert load(folder)[0].settings[1].kind == "softmax"
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_failure_while_writing_leaves_the_old_model(folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("protoseg.models.saving.save_file", full)
    with pytest.raises(UserError, match=r"best: the model cannot be written .*No space left"):
        save(make("softmax"), folder, META)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["best"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/best: the model cannot be written"):
        save(make(), tmp_path / "file" / "best", META)


def test_what_cannot_be_loaded_is_not_saved(tmp_path):
    segmenter = make()
    with pytest.raises(UserError, match=r"2 class names but the head 3 classes"):
        save(segmenter, tmp_path / "best", {"names": ["a", "b"]})
    with pytest.raises(UserError, match=r"plain data"):
        save(segmenter, tmp_path / "best", {**META, "model": segmenter})
    with pytest.raises(UserError, match=r"ignore_index 0 but the head 255"):
        save(segmenter, tmp_path / "best", {**META, "ignore_index": 0})
    bare = Segmenter(segmenter.backbone, segmenter.decoder, segmenter.head, (0, 0, 0), (1, 1, 1))
    with pytest.raises(UserError, match=r"made by models.build"):
        save(bare, tmp_path / "best", META)
    with pytest.raises(UserError, match=r"is a FrozenHead, but its settings make a PrototypeHead"):
        save(segmenter.for_inference(), tmp_path / "best", META)
    own = segmenter.head
    for changed, what in (
        (PrototypeHead(own.in_channels, 3, num_prototypes=4, embed_dim=8), "prototypes"),
        (PrototypeHead(own.in_channels, 3, num_prototypes=2, embed_dim=8, distance="huber"), "distance"),
    ):
        segmenter.head = changed
        with pytest.raises(UserError, match=rf"differs from its settings in .*{what}"):
            save(segmenter, tmp_path / "best", META)
    segmenter.head = own
    segmenter.head.prototypes[0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=r"not finite in head.prototypes"):
        save(segmenter, tmp_path / "best", META)
    assert list(tmp_path.iterdir()) == []
