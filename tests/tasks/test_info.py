"""`info` names what is in a folder and counts what learns and what is only stored."""

import json

import pytest

from protoseg.config import Head, Model, UserError
from protoseg.models import build, saving
from protoseg.tasks.info import info


@pytest.fixture
def model(tmp_path):
    segmenter = build(Model(network="tiny"), Head(num_prototypes=4, embed_dim=8), 3)
    return saving.save(segmenter, tmp_path / "run" / "final", {"names": ["a", "b", "c"], "base_size": 96})


def test_a_model_is_described_with_parameters_learnable_and_stored(model, capsys):
    found = info(str(model), as_json=True)
    assert json.loads(capsys.readouterr().out)["classes"] == {"0": "a", "1": "b", "2": "c"}
    assert found["parameters"]["prototypes"] == 3 * 4 * 8
    assert found["parameters"]["learnable"] > 0
    assert found["base_size"] == 96
    assert found["prototypes"]["used"] == 1
    assert -1 <= found["prototypes"]["pairwise_cosine"] <= 1


def test_a_run_is_described_with_its_models_and_last_metrics(model, capsys):
    run = model.parent
    (run / "config.yaml").write_text("steps: 7\nhead:\n  embed_dim: 8\n  kind: prototype\n")
    (run / "env.json").write_text('[{"world": 2}, {"world": 1}]')
    (run / "metrics.csv").write_text("step,loss,val/miou\n1,0.5,\n1,,0.1\n2,0.25,\n2,,0.2\n")
    found = info(str(run))
    assert found["recipe, where not the default"] == {"steps": 7, "head.embed_dim": 8}
    assert found["environment"] == {"world": 1}
    assert found["last validation"] == {"step": "2", "val/miou": "0.2"}
    assert found["last training"]["loss"] == "0.25"
    assert found["final"]["parameters"]["prototypes"] == 96
    assert "classes:\n    0: a" in capsys.readouterr().out


def test_any_other_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither a run"):
        info(str(tmp_path))


def test_data_sets_are_found_through_their_variables(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PROTOSEG_CAMVID", str(tmp_path))
    monkeypatch.setenv("PROTOSEG_VOC", str(tmp_path / "gone"))
    monkeypatch.delenv("PROTOSEG_ADE20K", raising=False)
    found = info()["data sets"]
    assert found["camvid"] == str(tmp_path)
    assert "not there" in found["voc"]
    assert "PROTOSEG_ADE20K" in found["ade20k"]
