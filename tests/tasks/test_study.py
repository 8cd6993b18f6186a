"""Studies as a user meets them: cells, resume, refusals, several processes, the report.

Most tests let a small script stand in for the training of a cell (`stand_in`): what is tested is the study. The real
cells are at the end.
"""

import csv
import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from protoseg.cli import varied
from protoseg.config import Head, Study, UserError
from protoseg.method.presets import PRESETS
from protoseg.models import saving
from protoseg.tasks import study as runner
from protoseg.tasks.run_folder import flat
from protoseg.tasks.study import study
from protoseg.tasks.study_cell import read_state, recipe_from, run_cell, split_of
from protoseg.tasks.study_plan import cells_of, fingerprint, settings_of, variants_of

RECIPE = """
data: {name: synthetic, length: 8, crop_size: [32, 48], workers: 0, val_split: ""}
model: {network: tiny}
head: {num_prototypes: 2, embed_dim: 8}
steps: 3
batch_size: 4
val_every: 0
checkpoint_every: 1
log_every: 1
accelerator: cpu
"""

STAND_IN = """
import json, os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
state = json.loads((folder / "cell.json").read_text())
print("threads", os.environ["OMP_NUM_THREADS"], "GPU", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
with open(folder.parents[1] / "order.txt", "a") as file:
    file.write(f"{state['variant']}/{state['seed']}\\n")
if (folder.parents[1] / f"slow-{state['variant']}").exists():
    time.sleep(60)
if (folder.parents[1] / f"broken-{state['variant']}").exists():
    sys.exit("the loss exploded")
score = 0.5 + 0.1 * state["seed"] + GAINS.get(state["variant"], [0, 0, 0])[state["seed"]]
(folder / "final").mkdir(exist_ok=True)
for column in state["columns"]:
    report = {
        "miou": score, "pixel_accuracy": 0.9, "mean_accuracy": 0.8, "boundary_miou": None, "calibration_error": 0.1,
        "parameters": {"learnable": 1000, "prototypes": 20}, "prototypes": {"pairwise_cosine": 0.5, "used": 1.0},
        "classes": [{"name": "<sky>", "iou": score}, {"name": "sea", "iou": None}],
    }
    (folder / "final" / f"evaluation-{column}.json").write_text(json.dumps(report))
(folder / "metrics.csv").write_text("step,ms_per_step\\n1,30\\n2,10\\n3,20\\n")
state |= {"trained": True, "evaluated": state["columns"], "state": "done", "peak_mib": 100.0}
(folder / "cell.json").write_text(json.dumps(state))
"""
GAINS = {"two": [0.01, 0.02, 0.03], "three": [-0.01, 0.0, 0.01]}
PLAN = Study(
    variants={"one": {"head.kind": "softmax"}, "two": {}, "three": {"head.num_prototypes": 1}},
    baselines=("one",),
    metrics=("miou", "pixel_accuracy", "calibration_error"),
)


@pytest.fixture
def build(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return varied(tmp_path / "recipe.yaml")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    script = tmp_path / "cell.py"
    script.write_text(STAND_IN.replace("GAINS", repr(GAINS)))
    monkeypatch.setattr(runner, "command", lambda cell: [sys.executable, str(script), str(cell.folder)])


def order(folder):
    path = folder / "order.txt"
    return path.read_text().split() if path.is_file() else []


def results(folder):
    return json.loads((folder / "results.json").read_text())


# what a study consists of


def test_a_grid_is_every_combination_and_stands_beside_the_variants():
    plan = Study(variants={"plain": {}}, grid={"head.num_prototypes": [1, 5], "head.momentum": [0.9, 0.99]})
    assert variants_of(plan) == {
        "plain": {},
        "num_prototypes=1,momentum=0.9": {"head.num_prototypes": 1, "head.momentum": 0.9},
        "num_prototypes=1,momentum=0.99": {"head.num_prototypes": 1, "head.momentum": 0.99},
        "num_prototypes=5,momentum=0.9": {"head.num_prototypes": 5, "head.momentum": 0.9},
        "num_prototypes=5,momentum=0.99": {"head.num_prototypes": 5, "head.momentum": 0.99},
    }


def test_settings_of_one_last_name_keep_their_whole_names():
    assert list(variants_of(Study(grid={"head.momentum": [0.9], "optim.momentum": [0.5]}))) == [
        "head.momentum=0.9,optim.momentum=0.5"
    ]


def test_cells_of_a_seed_differ_in_nothing_but_the_variant(build, tmp_path):
    plan = replace(PLAN, overrides={"data.length": 12}, seeds=(0, 7))
    cells = cells_of(tmp_path, plan, variants_of(plan), build)
    assert [cell.name for cell in cells] == [
        f"{variant}/seed{seed}" for seed in (0, 7) for variant in ("one", "two", "three")
    ]
    assert {cell.recipe.seed for cell in cells[:3]} == {0}
    assert {cell.recipe.data.length for cell in cells} == {12}
    one, three = (flat(asdict_of(cell.recipe)) for cell in (cells[0], cells[2]))
    assert {name for name in one if one[name] != three[name]} == {"head.kind", "head.num_prototypes", "out"}
    assert cells[2].recipe.head == Head(num_prototypes=1, embed_dim=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": {}}, "no variants"),
        ({"variants": {"../out": {}}}, "becomes a folder"),
        ({"variants": {"a": {"head.colour": 1}}, "baselines": ()}, "variant a: .*colour"),
        ({"variants": {"a": {"head.kind": "hardmax"}}, "baselines": ()}, "variant a: .*hardmax"),
        ({"variants": {"a": {"seed": 3}}, "baselines": ()}, "seed is set by the study"),
        ({"variants": {"a": {"steps": 0}}, "baselines": ()}, "variant a: steps must be at least 1"),
        ({"variants": {"a": {"devices": 2}}, "baselines": ()}, "devices and nodes to 1"),
        ({"baselines": ("four",)}, "baseline 'four' is no variant; there are one, two, three"),
        ({"seeds": (1, 1)}, "different numbers"),
        ({"grid": {"steps": []}}, "needs a list of values"),
        ({"variants": {"steps=3": {}}, "grid": {"steps": [3]}, "baselines": ()}, "already a variant"),
        ({"evaluate": {"drive": "test/a/b"}}, "COLUMN: SPLIT/BEGINNING"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_runs(build, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        study(tmp_path / "s", replace(PLAN, **change), build)
    assert not (tmp_path / "s").exists()


def test_only_of_an_unknown_variant_is_refused(build, tmp_path):
    with pytest.raises(UserError, match="--only four"):
        study(tmp_path / "s", PLAN, build, only=["four"])


def test_a_column_is_a_split_or_the_beginning_of_its_names():
    assert split_of("test") == ("test", "")
    assert split_of("test/Seq05VD*") == ("test", "Seq05VD")


def test_the_hash_is_of_what_changes_numbers(build):
    usual = fingerprint(settings_of(build({})))
    for same in ({"data.root": "elsewhere"}, {"data.workers": 3}, {"checkpoint_every": 7}, {"accelerator": "auto"}):
        assert fingerprint(settings_of(build(same))) == usual
    for other in ({"steps": 4}, {"head.momentum": 0.5}, {"model.weights": "w.safetensors"}, {"optim.lr": 0.5}):
        assert fingerprint(settings_of(build(other))) != usual


def test_another_description_of_the_data_is_another_cell(build, tmp_path):
    described = tmp_path / "set.yaml"
    described.write_text("names: [a]")
    first = fingerprint(settings_of(build({"data.file": str(described)})))
    described.write_text("names: [a, b]")
    assert fingerprint(settings_of(build({"data.file": str(described)}))) != first


def test_a_recipe_survives_the_cells_file(build, tmp_path):
    (cell, *_) = cells_of(tmp_path, PLAN, variants_of(PLAN), build)
    (tmp_path / "cell.json").write_text(json.dumps({"recipe": json.loads(json.dumps(asdict_of(cell.recipe)))}))
    assert recipe_from(read_state(tmp_path)["recipe"], tmp_path) == cell.recipe


def asdict_of(recipe):
    import dataclasses

    return dataclasses.asdict(recipe)


# running


def test_a_study_runs_all_cells_and_skips_them_the_next_time(build, stand_in, tmp_path, capsys):
    folder = tmp_path / "s"
    assert study(folder, PLAN, build, workers=3, threads=1) == 0
    assert len(order(folder)) == 9
    assert study(folder, PLAN, build) == 0
    assert len(order(folder)) == 9
    assert "9 of 9 cells are done" in capsys.readouterr().out


def test_the_folder_is_enough_to_go_on_from(build, stand_in, tmp_path):
    folder = tmp_path / "s"
    study(folder, replace(PLAN, seeds=(0,), overrides={"data.length": 12}), build, threads=1)
    import yaml

    kept = yaml.safe_load((folder / "study.yaml").read_text())
    assert kept["recipe"] == "recipe.yaml"
    again = Study(**{**kept, **{name: tuple(kept[name]) for name in ("baselines", "seeds", "metrics")}})
    assert study(folder, again, varied(folder / "recipe.yaml")) == 0
    assert len(order(folder)) == 3


def test_more_seeds_and_columns_run_only_what_is_new(build, stand_in, tmp_path):
    folder = tmp_path / "s"
    study(folder, replace(PLAN, seeds=(0,)), build, threads=1)
    study(folder, replace(PLAN, seeds=(0, 1)), build, threads=1)
    assert order(folder)[3:] == ["one/1", "two/1", "three/1"]
    more = replace(PLAN, seeds=(0,), evaluate={"test": "test", "val": "val"})
    study(folder, more, build, threads=1)
    assert order(folder)[6:] == ["one/0", "two/0", "three/0"]


def test_only_runs_one_variant_and_reports_all(build, stand_in, tmp_path):
    folder = tmp_path / "s"
    study(folder, replace(PLAN, seeds=(0,)), build, only=["two"], threads=1)
    assert order(folder) == ["two/0"]
    assert [variant["seeds"] for variant in results(folder)["variants"]] == [[], [0], []]


def test_a_dry_run_prints_and_writes_nothing(build, stand_in, tmp_path, capsys):
    folder = tmp_path / "s"
    assert study(folder, PLAN, build, dry_run=True) == 0
    assert not folder.exists()
    assert "0 of 9 cells done" in capsys.readouterr().out
    study(folder, replace(PLAN, seeds=(0,)), build, only=["two"], threads=1)
    capsys.readouterr()
    study(folder, PLAN, build, dry_run=True)
    shown = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert shown["two/seed0"] == "done"
    assert shown["two/seed1"] == "waiting"


def test_a_changed_setting_is_refused_and_named(build, stand_in, tmp_path):
    folder = tmp_path / "s"
    study(folder, replace(PLAN, seeds=(0,)), build, threads=1)
    changed = replace(PLAN, seeds=(0,), overrides={"optim.lr": 0.5})
    with pytest.raises(UserError, match=r"one/seed0 was run with other settings: optim.lr was 0.001, now 0.5"):
        study(folder, changed, build)
    study(folder, replace(PLAN, seeds=(0,), overrides={"data.workers": 1}), build)  # changes no number
    assert len(order(folder)) == 3


def test_a_cell_is_not_continued_once_its_preset_means_something_else(build, stand_in, tmp_path, monkeypatch):
    folder, plan = tmp_path / "s", replace(PLAN, seeds=(0,))
    study(folder, plan, build, threads=1)
    monkeypatch.setitem(PRESETS["default"], "kappa", 0.5)
    with pytest.raises(UserError, match=r"was run with other settings: head.kappa was 0.05, now 0.5"):
        study(folder, plan, build)


def test_a_cell_from_before_a_setting_existed_is_still_the_same(build, stand_in, tmp_path):
    folder = tmp_path / "s"
    plan = replace(PLAN, seeds=(0,))
    study(folder, plan, build, threads=1)
    path = folder / "two" / "seed0" / "cell.json"
    state = json.loads(path.read_text())
    del state["settings"]["head.reseed_after"]
    path.write_text(json.dumps(state))
    assert study(folder, plan, build) == 0
    assert len(order(folder)) == 3


def test_a_run_that_is_no_cell_is_left_alone(build, tmp_path):
    (tmp_path / "s" / "one" / "seed0").mkdir(parents=True)
    (tmp_path / "s" / "one" / "seed0" / "config.yaml").write_text("steps: 3")
    with pytest.raises(UserError, match="no part of a study"):
        study(tmp_path / "s", PLAN, build)


def test_a_failed_cell_is_reported_and_the_others_go_on(build, stand_in, tmp_path, capsys):
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "broken-two").touch()
    plan = replace(PLAN, seeds=(0,))
    assert study(folder, plan, build, threads=1) == 1
    assert order(folder) == ["one/0", "two/0", "three/0"]
    assert "two/seed0: FAILED" in capsys.readouterr().err
    cell = results(folder)["cells"][1]
    assert (cell["variant"], cell["state"], cell["error"]) == ("two", "failed", "the loss exploded")
    for page in ("report.md", "report.html"):
        assert "the loss exploded" in (folder / page).read_text()

    (folder / "broken-two").unlink()
    assert study(folder, plan, build, threads=1) == 0
    assert order(folder)[3:] == ["two/0"]
    assert results(folder)["cells"][1]["error"] is None


def test_threads_and_devices_reach_the_cells(build, stand_in, tmp_path):
    folder = tmp_path / "s"
    study(folder, replace(PLAN, seeds=(0,)), build, workers=2, threads=3, devices=["4", "5"])
    logs = [(folder / name / "seed0" / "cell.log").read_text() for name in ("one", "two")]
    assert [log.split() for log in logs] == [["threads", "3", "GPU", "4"], ["threads", "3", "GPU", "5"]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_cells_and_the_study(build, stand_in, tmp_path, number):
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "slow-two").touch()
    (folder / "slow-one").touch()
    outside = signal.signal(number, signal.SIG_DFL)  # a job in the background ignores Ctrl-C
    try:
        stopper = when(lambda: len(order(folder)) == 2, lambda: os.kill(os.getpid(), number))
        assert study(folder, replace(PLAN, seeds=(0,)), build, workers=2, threads=1) == 128 + number
        stopper.join()
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, outside)
    assert order(folder).count("three/0") == 0
    assert {cell["state"] for cell in results(folder)["cells"]} == {"stopped", "waiting"}
    (folder / "slow-two").unlink()
    (folder / "slow-one").unlink()
    assert study(folder, replace(PLAN, seeds=(0,)), build, threads=1) == 0


def when(condition, then, patience=60):
    """A thread that waits for the condition, then acts."""

    def wait():
        end = time.monotonic() + patience
        while not condition() and time.monotonic() < end:
            time.sleep(0.02)
        then()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_cell_another_process_has_is_not_run_twice(build, stand_in, tmp_path, capsys):
    folder = tmp_path / "s"
    plan = replace(PLAN, seeds=(0,))
    first = cells_of(folder, plan, variants_of(plan), build)[0]
    elsewhere = runner.claim(folder, first)
    assert runner.claim(folder, first) is None
    assert study(folder, plan, build, threads=1) == 0
    assert order(folder) == ["two/0", "three/0"]
    assert "being run by another process: 1" in capsys.readouterr().out
    study(folder, plan, build, dry_run=True)
    assert "running" in capsys.readouterr().out
    elsewhere.close()
    assert study(folder, plan, build, threads=1) == 0
    assert order(folder) == ["two/0", "three/0", "one/0"]


def test_a_cell_keeps_its_claim_when_the_study_is_killed_and_loses_it_with_its_own_life(build, stand_in, tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "slow-one").touch()
    cell = cells_of(folder, PLAN, variants_of(PLAN), build)[0]
    running = runner.start(folder, cell, PLAN, 1, 1, None)
    running.lock.close()  # what the death of the study does
    assert runner.claim(folder, cell) is None
    running.process.kill()
    running.process.wait()
    freed = runner.claim(folder, cell)
    assert freed is not None
    freed.close()


def test_a_fault_of_the_study_itself_leaves_no_cell_running(build, stand_in, tmp_path, monkeypatch):
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "slow-two").touch()
    started = []
    original = runner.start
    monkeypatch.setattr(runner, "start", lambda *given: started.append(original(*given)) or started[-1])
    monkeypatch.setattr(runner, "scores", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        study(folder, replace(PLAN, seeds=(0,)), build, workers=2, threads=1)
    assert len(started) == 2
    assert all(one.process.poll() is not None for one in started)


# the report


@pytest.fixture
def finished(build, stand_in, tmp_path):
    folder = tmp_path / "s"
    plan = replace(PLAN, evaluate={"test": "test", "drive": "test/a*"})
    study(folder, plan, build, workers=3, threads=1)
    return folder


def test_paired_differences_by_hand(finished):
    content = results(finished)
    two, three = content["differences"]
    assert (two["variant"], two["baseline"], two["seeds"]) == ("two", "one", [0, 1, 2])
    miou = two["columns"]["drive"]["miou"]
    assert miou["values"] == pytest.approx([0.01, 0.02, 0.03])
    assert (miou["mean"], miou["low"], miou["high"]) == pytest.approx((0.02, -0.0048414, 0.0448414), abs=1e-7)
    assert three["columns"]["test"]["miou"]["mean"] == pytest.approx(0.0, abs=1e-12)
    assert two["classes"]["test"]["<sky>"]["mean"] == pytest.approx(0.02)
    assert two["classes"]["test"]["sea"]["mean"] is None
    assert "boundary_miou" not in two["columns"]["test"]

    variant = content["variants"][1]
    assert variant["columns"]["test"]["miou"]["mean"] == pytest.approx(0.62)
    assert variant["costs"]["ms_per_step"]["mean"] == 20
    assert variant["costs"]["peak_mib"]["mean"] == 100
    assert variant["costs"]["learnable"]["mean"] == 1000


def test_the_table_holds_the_same_numbers(finished):
    with open(finished / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    (gap,) = (
        row
        for row in rows
        if (row["variant"], row["baseline"], row["column"], row["metric"]) == ("two", "one", "test", "miou")
    )
    assert float(gap["mean"]) == pytest.approx(0.02)
    assert float(gap["high"]) == pytest.approx(0.0448414, abs=1e-7)
    text = (finished / "report.md").read_text()
    assert "| two | 3 | +2.00 [-0.48, +4.48] |" in text
    assert "| one | 3 | 60.00 ± 10.00 |" in text


def test_the_page_is_whole_escapes_names_and_fetches_nothing(finished):
    page = (finished / "report.html").read_text()
    assert "&lt;sky&gt;" in page
    assert "<sky>" not in page
    assert page.count("data:image/png;base64,") == 1
    assert not any(word in page for word in ("http://", "https://", "<script", "<link", "@import"))
    assert str(Path.home()) not in page


def test_the_plot_shows_every_seed(finished):
    from PIL import Image

    with Image.open(finished / "differences.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200


def test_one_seed_has_a_difference_and_no_interval(build, stand_in, tmp_path):
    folder = tmp_path / "s"
    study(folder, replace(PLAN, seeds=(2,)), build, threads=1)
    gap = results(folder)["differences"][0]["columns"]["test"]["miou"]
    assert (gap["mean"], gap["low"], gap["high"], gap["n"]) == (pytest.approx(0.03), None, None, 1)
    assert "| two | 1 | +3.00 |" in (folder / "report.md").read_text()
    assert (folder / "differences.png").is_file()


def test_only_complete_pairs_are_compared(build, stand_in, tmp_path):
    folder = tmp_path / "s"
    study(folder, replace(PLAN, seeds=(0, 1)), build, only=["two"], threads=1)
    study(folder, replace(PLAN, seeds=(1,)), build, only=["one"], threads=1)
    study(folder, replace(PLAN, seeds=(0, 1)), build, report_only=True)
    assert results(folder)["differences"][0]["seeds"] == [1]


def test_a_report_of_nothing_says_so(build, tmp_path):
    folder = tmp_path / "s"
    assert study(folder, PLAN, build, report_only=True) == 0
    assert "0 of 9 runs done" in (folder / "report.md").read_text()
    assert not (folder / "differences.png").exists()
    assert "Not done" in (folder / "report.html").read_text()


# real cells


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def begin(folder, plan, build, name):
    """Everything but the process: the cell's folder as the study leaves it to the cell."""
    cell = next(cell for cell in cells_of(folder, plan, variants_of(plan), build) if cell.name == name)
    cell.folder.mkdir(parents=True)
    state = {"recipe": asdict_of(cell.recipe), "settings": settings_of(cell.recipe), "columns": plan.evaluate}
    (cell.folder / "cell.json").write_text(json.dumps({**state, "variant": cell.variant, "seed": cell.seed}))
    return cell


def test_a_cell_is_an_ordinary_run_folder_and_a_new_column_only_evaluates(build, tmp_path, one_thread):
    plan = replace(PLAN, seeds=(0,))
    cell = begin(tmp_path, plan, build, "two/seed0")
    run_cell(cell.folder)
    state = read_state(cell.folder)
    assert state["state"] == "done"
    assert state["evaluated"] == {"test": "test"}
    assert state["peak_mib"] > 50
    assert {path.name for path in cell.folder.iterdir()} >= {"config.yaml", "metrics.csv", "final", "checkpoints"}
    _, meta = saving.load(cell.folder / "final")
    assert meta["step"] == 3

    written = (cell.folder / "final" / "model.safetensors").stat().st_mtime_ns
    (cell.folder / "cell.json").write_text(json.dumps({**state, "columns": {"test": "test", "val": "val"}}))
    run_cell(cell.folder)
    assert (cell.folder / "final" / "model.safetensors").stat().st_mtime_ns == written
    report = json.loads((cell.folder / "final" / "evaluation-val.json").read_text())
    assert report["split"] == "val"
    assert 0 <= report["miou"] <= 1


def test_partners_see_the_same_images_in_the_same_order(build, tmp_path, monkeypatch, one_thread):
    from protoseg.tasks.training import Stream

    seen = {}
    original = Stream.__iter__

    def spied(self):
        for batch in original(self):
            seen[name].append((batch["index"].tolist(), batch["image"].sum().item()))
            yield batch

    monkeypatch.setattr(Stream, "__iter__", spied)
    for name in ("one/seed1", "three/seed1", "three/seed2"):
        seen[name] = []
        run_cell(begin(tmp_path, PLAN, build, name).folder)
    assert len(seen["one/seed1"]) >= 3
    assert seen["one/seed1"] == seen["three/seed1"]
    assert seen["one/seed1"] != seen["three/seed2"]


@pytest.mark.slow
def test_a_killed_cell_goes_on_from_its_checkpoint(build, tmp_path, monkeypatch, capsys):
    """As processes: killed after some steps, reported as failed; then continued to what it would have been."""
    folder = tmp_path / "s"
    plan = replace(PLAN, variants={"two": {}}, baselines=(), seeds=(0,), overrides={"steps": 30})
    run, started = folder / "two" / "seed0", []
    original = runner.start
    monkeypatch.setattr(runner, "start", lambda *given: started.append(original(*given)) or started[-1])
    killer = when((run / "checkpoints" / "last.ckpt").is_file, lambda: started[0].process.kill(), patience=300)
    assert study(folder, plan, build, threads=1) == 1
    killer.join()
    assert read_state(run)["error"] == "killed by SIGKILL"
    step = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < step < 30

    assert study(folder, plan, build, threads=1) == 0
    assert read_state(run)["state"] == "done"
    with open(run / "metrics.csv", newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, 31))
    assert len(json.loads((run / "env.json").read_text())) == 2  # begun twice, once over from the checkpoint
    assert "mIoU" in capsys.readouterr().out
