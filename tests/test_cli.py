"""The command line: what it accepts, refuses and costs. Verbs themselves are tested with their tasks."""

import json
import os
import subprocess
import sys
import time

import pytest
import yaml

import protoseg
from protoseg.cli import VERBS, argument_help, main, parse, recipe_of
from protoseg.config import Data, DataError, Evaluation, Head, Model, Optim, Recipe, UserError


def run(*words):
    """Exit code, stdout, stderr of a real process."""
    done = subprocess.run([sys.executable, "-m", "protoseg", *words], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def code_of(*words):
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    return stop.value.code


def recipe(*words):
    return recipe_of(parse(["train", *words])[1])


def test_help_is_quick_and_does_not_import_torch():
    code = """
import sys
from protoseg.cli import main
try: main(sys.argv[1:])
except SystemExit: pass
print("IMPORTED", *(name for name in ("torch", "numpy", "lightning", "timm", "PIL") if name in sys.modules))
"""
    for words in (["--help"], ["train", "--help"], ["evaluate", "--help"], ["--version"]):
        before = os.times()  # work, not waiting: the machine may be busy with something else
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
        after = os.times()
        assert done.stdout.splitlines()[-1].strip() == "IMPORTED"
        assert after.children_user + after.children_system - before.children_user - before.children_system < 1.5


def test_version():
    assert run("--version") == (0, f"protoseg {protoseg.__version__}\n", "")


@pytest.mark.parametrize("name", [word for verb in VERBS for word in (verb.name, *verb.aliases)])
def test_every_verb_explains_itself(name, capsys):
    assert code_of(name, "--help") == 0
    assert f"protoseg {name}" in capsys.readouterr().out or name in ("eval", "val", "test")


def test_defaults_are_those_of_the_dataclasses():
    assert recipe() == Recipe()


def test_files_apply_in_order_and_options_last(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 7\nhead: {kind: cosine, num_prototypes: 3}\n")
    (tmp_path / "b.yaml").write_text("head:\n  num_prototypes: 4\noptim: {lr: 0.5}\n")
    given = recipe("--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml"), "--optim.lr", "0.25")
    assert given == Recipe(steps=7, head=Head(kind="cosine", num_prototypes=4), optim=Optim(lr=0.25))


def test_a_section_may_be_a_file_beside_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "data.yaml").write_text("crop_size: [64, 96]\nhflip: 0.0\n")
    (tmp_path / "recipe.yaml").write_text("data: parts/data.yaml\nsteps: 3\n")
    monkeypatch.chdir("/")
    given = recipe("--config", str(tmp_path / "recipe.yaml"), "--data.hflip", "0.25")
    assert given == Recipe(steps=3, data=Data(crop_size=(64, 96), hflip=0.25))


def test_print_config_is_the_recipe(tmp_path, capsys):
    assert code_of("train", "--steps", "5", "--data.crop_size", "[64,96]", "--print_config") == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert recipe("--config", str(path)) == Recipe(steps=5, data=Data(crop_size=(64, 96)))


@pytest.mark.parametrize(
    "words",
    [
        ["--head.num_protos", "5"],
        ["--stepz", "5"],
        ["--steps", "many"],
        ["--steps", "1.5"],
        ["--head.kind", "linear"],
        ["--data.crop_size", "[1,2,3]"],
        ["--optim", "[1]"],
    ],
    ids=" ".join,
)
def test_a_wrong_option_is_a_usage_error_in_one_line(words, capsys):
    assert code_of("train", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("protoseg: error: ")
    assert error.count("\n") == 1
    assert words[0].removeprefix("--") in error


@pytest.mark.parametrize(
    ("words", "missing"), [(["predict", "runs/a"], "images"), (["predict"], "model"), (["evaluate"], "model")]
)
def test_what_is_not_given_is_named_with_the_help_of_its_verb(words, missing, capsys):
    assert code_of(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"protoseg: error: not given: {missing}")
    assert error.endswith(f"(see protoseg {words[0]} --help)\n")


@pytest.mark.parametrize(
    "text",
    [
        "stepz: 5",
        "head: {num_protos: 5}",
        "steps: five",
        "steps: [",
        "- a list",
        "just words",
        "head: !!python/object/apply:os.system [touch owned]",
    ],
)
def test_a_wrong_file_is_a_usage_error(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    assert code_of("train", "--config", "recipe.yaml") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "owned").exists()


def test_no_verb_and_no_such_verb_are_usage_errors(capsys):
    assert code_of() == 2
    assert "train" in capsys.readouterr().out
    assert code_of("trian") == 2
    assert code_of("data") == 2
    assert "check" in capsys.readouterr().err


CANARY = "from pathlib import Path\nPath(__file__).with_name('owned').touch()\nclass X: pass\n"


@pytest.mark.parametrize(
    "words",
    [
        ["--data", "canary.X"],
        ["--data", '{"class_path": "canary.X"}'],
        ["--head.start", "canary.X"],
        ["--head", "canary.X"],
        ["--data.class_path", "canary.X"],
        ["--config", "plain.yaml"],
        ["--config", "path.yaml"],
        ["--config", "nested.yaml"],
    ],
    ids=" ".join,
)
def test_no_value_imports_a_module(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "canary.py").write_text(CANARY)
    (tmp_path / "plain.yaml").write_text("data: canary.X\n")
    (tmp_path / "path.yaml").write_text("data: {class_path: canary.X, init_args: {}}\n")
    (tmp_path / "nested.yaml").write_text("head: {start: {class_path: canary.X}}\n")
    start = time.process_time()
    assert code_of("train", *words) == 2
    assert time.process_time() - start < 2
    assert not (tmp_path / "owned").exists()
    assert "canary" not in sys.modules


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        "steps: 1 # " + "x" * 1_000_001,
        "[" * 5000,
    ],
    ids=["aliases", "large", "deep"],
)
def test_a_hostile_file_is_refused_at_once(text, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(text)
    start = time.process_time()
    assert code_of("train", "--config", str(tmp_path / "recipe.yaml")) == 2
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("a\nb"), 1), (DataError("a\nb"), 3), (KeyboardInterrupt(), 130)], ids=repr
)
def test_exit_codes(error, code, monkeypatch, capsys):
    def fail(_):
        raise error

    monkeypatch.setattr("protoseg.tasks.training.train", fail)
    assert code_of("train") == code
    assert capsys.readouterr().err in ("protoseg: error: a b\n", "protoseg: interrupted\n")


@pytest.mark.parametrize("kind", [RuntimeError, BrokenPipeError])  # a pipe that is not stdout
def test_an_unexpected_error_keeps_its_traceback(kind, monkeypatch):
    def fail(_):
        raise kind("a fault of ours")

    monkeypatch.setattr("protoseg.tasks.training.train", fail)
    with pytest.raises(kind, match="a fault of ours"):
        main(["train"])


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of another kind")
def test_a_reader_that_stops_early_ends_the_verb_without_a_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "protoseg", "info"]
    ended = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_data_is_refused_with_3(tmp_path):
    code, _, error = run("train", "--data.name", "camvid", "--data.root", str(tmp_path), "--out", str(tmp_path / "run"))
    assert code == 3
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_every_setting_has_a_help_text():
    for section in (Data, Model, Head, Optim, Evaluation, Recipe):
        helps = argument_help(section)
        sections = {"data", "model", "head", "optim", "evaluation"}
        assert set(section.__dataclass_fields__) - sections <= set(helps)
    assert argument_help(Evaluation)["stride"] == argument_help(Evaluation)["window"]


@pytest.mark.parametrize(("verb", "text"), [("predict", "folder to write to"), ("evaluate", "the JSON file")])
def test_an_option_of_a_verb_keeps_its_own_help_text(verb, text, capsys):
    assert code_of(verb, "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"--out OUT {text}" in shown
    assert "the run folder. An existing run" not in shown


def test_evaluate_takes_the_settings_of_the_run_and_the_users_on_top(tmp_path):
    model = tmp_path / "run" / "final"
    model.mkdir(parents=True)
    (model / "model.safetensors").touch()
    settings = {
        "data": {"name": "camvid", "root": "here", "crop_size": [9, 9]},
        "evaluation": {"flip": True},
        "steps": 3,
    }
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    for folder in (model, tmp_path / "run"):
        _, given = parse(["evaluate", str(folder), "--data.root", "there", "--evaluation.scales", "[1,2]"])
        assert given.data == Data(name="camvid", root="there", crop_size=(9, 9))
        assert given.evaluation == Evaluation(flip=True, scales=(1.0, 2.0))
    _, given = parse(["predict", str(model), "a.png", "b", "--evaluation.flip=false", "--max_pixels", "150000000"])
    assert given.evaluation == Evaluation()
    assert given.images == ["a.png", "b"]
    assert given.max_pixels == 150_000_000


def test_evaluate_outside_a_run_knows_nothing_that_was_not_said(tmp_path):
    _, given = parse(["eval", str(tmp_path)])
    assert given.data is None
    assert given.evaluation is None
    _, given = parse(["eval", str(tmp_path), "--data.name=camvid"])
    assert given.data == Data(name="camvid")


@pytest.mark.parametrize(
    ("words", "split"), [(["val"], "val"), (["eval"], "test"), (["val", "--split=train"], "train")]
)
def test_the_split_that_is_meant(words, split, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("protoseg.tasks.evaluation.evaluate", lambda model, **given: seen.update(given))
    assert code_of(words[0], str(tmp_path), *words[1:]) == 0
    assert seen["split"] == split


def test_data_check_reports_its_own_code(monkeypatch):
    monkeypatch.setattr("protoseg.tasks.audit.check", lambda data, json: 3 if data.name == "camvid" else 0)
    assert code_of("data", "check", "--data.name", "camvid") == 3
    assert code_of("data", "check") == 0


def test_data_verbs_take_whole_recipes(tmp_path):
    (tmp_path / "recipe.yaml").write_text("data: {name: camvid}\nsteps: 3\n")
    _, given = parse(["data", "stats", "--config", str(tmp_path / "recipe.yaml"), "--split", "val"])
    assert given.data == Data(name="camvid")
    assert given.split == "val"


def test_info_prints_what_is_installed(capsys):
    assert code_of("info", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["protoseg"] == protoseg.__version__
    assert "tiny" in found["networks"]
    assert found["data sets"]["synthetic"]
