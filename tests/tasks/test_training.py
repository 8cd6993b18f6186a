"""Training as a user meets it: a run folder, resume after a kill, signals, refusals."""

import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from picture_trees import write_folder_set, write_mask
from protoseg.config import Data, DataError, Evaluation, Head, Model, Optim, Recipe, UserError
from protoseg.method.presets import PRESETS
from protoseg.models import saving
from protoseg.tasks import machine, run_folder, training
from protoseg.tasks.machine import Machine
from protoseg.tasks.training import Stream, train

STEPS = 8


def small(out, **changes):
    recipe = Recipe(
        data=Data(crop_size=(32, 48), length=20, limit=20, workers=0),
        model=Model(network="tiny"),
        head=Head(num_prototypes=3, embed_dim=8),
        steps=STEPS,
        batch_size=4,
        micro_batch=2,  # two micro-batches a step; 5 steps an epoch, so the run crosses into the second
        val_every=4,
        checkpoint_every=1,
        log_every=2,
        out=str(out),
        accelerator="cpu",
    )
    return replace(recipe, **changes)


def last(run):
    return torch.load(Path(run) / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same(one, other, where=""):
    """Bitwise equality of nested plain data with tensors."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def metrics(run):
    """What a run measured, without what depends on the machine's mood."""
    with open(Path(run) / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in ("ms_per_step", "data_ms")} for row in csv.DictReader(file)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors: a second thread only waits, and on a busy machine it waits long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, and the indices of the images of each micro-batch in order."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        seen = record(patch)
        train(small(run))
    return run, seen


def record(patch):
    seen = []
    original = Stream.__iter__

    def spied(self):
        for batch in original(self):
            seen.append(batch["index"].tolist())
            yield batch

    patch.setattr(Stream, "__iter__", spied)
    return seen


def test_a_run_folder_holds_what_the_documentation_says(whole):
    run, _ = whole
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "env.json", "metrics.csv", "tensorboard", "checkpoints", "best", "final"),
    }
    environment = json.loads((run / "env.json").read_text())[-1]
    assert environment["global_batch"] == 4
    assert environment["accumulate"] == 2
    assert environment["train_items"] == 20
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0]
    assert yaml.safe_load((run / "config.yaml").read_text())["head"]["num_prototypes"] == 3
    assert [row["step"] for row in metrics(run)] == ["2", "4", "4", "6", "8", "8"]


def test_best_and_final_are_models_that_load(whole):
    run, _ = whole
    final, meta = saving.load(run / "final")
    assert meta["names"][0] == "sky"
    assert meta["step"] == STEPS
    state = {name.removeprefix("model."): value for name, value in last(run)["state_dict"].items()}
    assert_same(dict(final.state_dict()), {name: state[name] for name in final.state_dict()})
    _, meta = saving.load(run / "best")
    scores = {row["step"]: row["val/miou"] for row in metrics(run) if row["val/miou"]}
    best = max(scores.values(), key=float)
    assert scores[str(meta["step"])] == best
    assert meta["metrics"]["val/miou"] == pytest.approx(float(best))


def test_checkpoints_hold_plain_data_only(whole):
    last(whole[0])  # weights_only=True refuses anything else


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours may act on it."""


# 4 and 8 validate, 5 steps are an epoch
@pytest.mark.parametrize(("kill", "workers"), [(1, 0), (4, 0), (5, 0), (7, 0), (4, 2), (7, 2)])
def test_a_killed_run_continues_bitwise_equal(whole, tmp_path, monkeypatch, kill, workers):
    run, seen = whole
    recipe = small(tmp_path / "run", data=replace(small("").data, workers=workers))

    def die(self, trainer, *_):
        if trainer.global_step == kill:
            self._between_steps = False  # so that the exception leaves no checkpoint, as a kill would not
            raise Killed

    with monkeypatch.context() as patch:
        before = record(patch)
        patch.setattr(training.Checkpoints, "on_train_batch_start", die)
        with pytest.raises(Killed):
            train(recipe)
    assert last(recipe.out)["global_step"] == kill
    with monkeypatch.context() as patch:
        after = record(patch)
        train(replace(recipe, resume="auto"))

    assert before[: 2 * kill] + after == seen
    ours, theirs = last(recipe.out), last(run)
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(ours[part], theirs[part])
    assert metrics(recipe.out) == metrics(run)
    for name in ("best", "final"):
        one, two = saving.load(Path(recipe.out) / name), saving.load(run / name)
        assert_same(dict(one[0].state_dict()), dict(two[0].state_dict()))
        assert one[1] == two[1]


def test_a_run_killed_while_it_validates_validates_when_resumed(whole, tmp_path, monkeypatch):
    run, _ = whole
    recipe = small(tmp_path / "run")

    def die(*_):
        raise Killed

    for _ in range(2):  # the second time it dies in the validation that resuming begins with
        with monkeypatch.context() as patch:
            patch.setattr(training.SegmentationModule, "validate", die)
            with pytest.raises(Killed):
                train(replace(recipe, resume="auto"))
        assert last(recipe.out)["global_step"] == 4
    train(replace(recipe, resume="auto"))
    assert metrics(recipe.out) == metrics(run)


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_in_memory_change_no_bit_of_a_run(whole, tmp_path, workers):
    recipe = small(tmp_path / "run")
    train(replace(recipe, data=replace(recipe.data, resident=True, workers=workers)))
    for part in ("state_dict", "optimizer_states"):
        assert_same(last(recipe.out)[part], last(whole[0])[part])
    assert metrics(recipe.out) == metrics(whole[0])


def test_checkpoints_are_written_by_the_clock(tmp_path, monkeypatch):
    recipe = small(tmp_path / "run", checkpoint_every=0, val_every=0, checkpoint_minutes=1.0)
    now, written = [0.0], []
    save = training.Checkpoints.save

    def tick(self, *_):
        self._between_steps = False
        now[0] += 25  # seconds a step

    def noted(self, trainer):
        save(self, trainer)
        written.append(trainer.global_step)

    monkeypatch.setattr("protoseg.engine.checkpoints.time.monotonic", lambda: now[0])
    monkeypatch.setattr(training.Checkpoints, "on_train_batch_start", tick)
    monkeypatch.setattr(training.Checkpoints, "save", noted)
    train(replace(recipe, micro_batch=4))
    assert written == [3, 6, 8]  # after 75 and 150 seconds, and at the end


def test_ema_is_resumed_evaluated_and_saved(tmp_path, monkeypatch):
    recipe = small(tmp_path / "whole", ema=0.9)
    train(recipe)
    other = replace(recipe, out=str(tmp_path / "cut"))

    def die(self, trainer, *_):
        self._between_steps = False
        if trainer.global_step == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training.Checkpoints, "on_train_batch_start", die)
        with pytest.raises(Killed):
            train(other)
    train(replace(other, resume="auto"))
    assert_same(last(other.out)["callbacks"], last(recipe.out)["callbacks"])
    assert metrics(other.out) == metrics(recipe.out)

    state = last(recipe.out)
    average = next(s["average"] for s in state["callbacks"].values() if "average" in s)
    final = saving.load(Path(recipe.out) / "final")[0]
    weights = dict(final.named_parameters())
    assert_same({f"model.{k}": v.data for k, v in weights.items()}, average)
    assert not all(torch.equal(v, state["state_dict"][f"model.{k}"]) for k, v in weights.items())
    assert torch.equal(final.head.prototypes, state["state_dict"]["model.head.prototypes"])


SCRIPT = """
import sys, yaml
from protoseg.cli import main
main(sys.argv[1:])
"""


def options(recipe):
    given = {
        "steps": recipe.steps, "batch_size": 4, "micro_batch": 2, "val_every": recipe.val_every, "log_every": 2,
        "checkpoint_every": recipe.checkpoint_every, "out": recipe.out, "accelerator": "cpu", "resume": "auto",
        "data.crop_size": "[32,48]", "data.length": 20, "data.limit": 20, "data.workers": recipe.data.workers,
        "model.network": "tiny", "head.num_prototypes": 3, "head.embed_dim": 8,
    }  # fmt: skip
    return ["train", *(f"--{name}={value}" for name, value in given.items())]


@pytest.mark.parametrize(("number", "code", "workers"), [(signal.SIGTERM, 143, 0), (signal.SIGINT, 130, 2)])
def test_a_signal_leaves_a_checkpoint_of_the_last_step_and_its_exit_code(tmp_path, number, code, workers):
    recipe = small(tmp_path / "run", steps=100_000, checkpoint_every=0, val_every=0)
    recipe = replace(recipe, data=replace(recipe.data, workers=workers))
    log = tmp_path / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *options(recipe)],
            stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    wait_for(lambda: "step 4/" in log.read_text(), process)
    process.send_signal(number)
    assert process.wait(60) == code, log.read_text()
    assert f"stopped by {signal.Signals(number).name}" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert last(recipe.out)["global_step"] >= 4


def test_loader_processes_end_with_the_run_and_on_sigterm(tmp_path, monkeypatch):
    recipe = small(tmp_path / "run")
    recipe = replace(recipe, data=replace(recipe.data, workers=2))
    workers = []

    def look(self, *_):
        self._between_steps = False
        # The first one started has given this batch; the other may not have come to its own signals yet.
        workers[:] = sorted(multiprocessing.active_children(), key=lambda worker: worker.pid)
        os.kill(workers[0].pid, signal.SIGTERM)
        workers[0].join(5)
        raise Killed

    monkeypatch.setattr(training.Checkpoints, "on_train_batch_start", look)
    with pytest.raises((Killed, RuntimeError)):  # torch may notice first that it has lost a worker
        train(recipe)
    assert len(workers) == 2
    assert workers[0].exitcode == -signal.SIGTERM
    assert not any(worker.is_alive() for worker in workers)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the process ended early"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_sigkill_at_any_moment_leaves_a_checkpoint_that_continues(whole, tmp_path):
    recipe = small(tmp_path / "run")
    command = [sys.executable, "-c", SCRIPT, *options(recipe)]
    path = Path(recipe.out) / "checkpoints" / "last.ckpt"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_for(path.is_file, process)
    process.kill()
    process.wait()
    train(replace(recipe, resume="auto"))
    assert_same(last(recipe.out)["state_dict"], last(whole[0])["state_dict"])


@pytest.mark.slow
def test_two_ranks_stop_together_and_one_rank_continues(tmp_path):
    recipe = small(tmp_path / "run", steps=100_000, checkpoint_every=0, val_every=0)
    log = tmp_path / "log"
    command = [sys.executable, "-c", SCRIPT, *options(recipe), "--devices=2", "--micro_batch=null"]
    script = tmp_path / "script.py"  # Lightning starts the second rank as `python FILE ...`
    script.write_text(SCRIPT)
    command[1:3] = [str(script)]
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    wait_for(lambda: "step 4/" in log.read_text(), process)
    process.terminate()
    assert process.wait(60) == 143, log.read_text()
    step = last(recipe.out)["global_step"]
    assert step >= 4
    longer = replace(recipe, resume="auto", micro_batch=None, steps=step + 2)
    with pytest.raises(UserError, match="beyond steps"):
        train(replace(longer, steps=step - 1))
    train(longer)
    assert last(recipe.out)["global_step"] == step + 2
    place = last(recipe.out)["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
    assert place["epoch"] * 20 + place["items_done"] == 4 * (step + 2)


def test_an_existing_run_is_refused_and_nothing_changes(whole):
    run, _ = whole
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(UserError, match="--resume auto"):
        train(small(run))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_second_training_in_one_folder_is_refused(tmp_path):
    recipe = small(tmp_path / "run")
    with run_folder.locked(Path(recipe.out)), pytest.raises(UserError, match="another training"):
        train(replace(recipe, resume="auto"))


def test_a_run_continues_only_with_its_own_settings(whole):
    run, _ = whole
    with pytest.raises(UserError, match=r"optim.lr was 0.001, now 0.1"):
        train(small(run, resume="auto", optim=Optim(lr=0.1)))


def test_a_run_does_not_continue_once_its_preset_means_something_else(whole, monkeypatch):
    run, _ = whole
    monkeypatch.setitem(PRESETS["default"], "kappa", 0.5)
    with pytest.raises(UserError, match=r"head.kappa was 0.05, now 0.5"):
        train(small(run, resume="auto"))


def test_a_finished_run_can_be_resumed_and_changes_nothing(whole):
    run, _ = whole
    before = last(run)["state_dict"]
    train(small(run, resume="auto"))
    assert_same(last(run)["state_dict"], before)


def test_a_broken_checkpoint_is_named(tmp_path):
    recipe = small(tmp_path / "run", resume="auto")
    path = Path(recipe.out) / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(UserError, match=r"last\.ckpt: not a readable checkpoint"):
        train(recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5}, "batch_size 5"),
        ({"batch_size": 0, "micro_batch": None}, "batch_size 0"),
        ({"steps": 0}, "steps must be"),
        ({"checkpoint_minutes": -1.0}, "checkpoint_minutes must not be negative"),
        ({"ema": 1.0}, "ema"),
        ({"precision": "16-mixed"}, "16-mixed needs a GPU"),
        ({"resume": "nowhere.ckpt"}, "nowhere.ckpt: no such checkpoint"),
        ({"optim": Optim(lr=-1.0)}, "optim.lr"),
        ({"evaluation": Evaluation(scales=())}, "evaluation.scales"),
        ({"evaluation": Evaluation(mode="slide", stride=(0, 9))}, "evaluation.stride"),
        ({"batch_size": 40}, "do not fill one global batch"),
        ({"model": Model(network="tiny", weights="nowhere.safetensors")}, "nowhere.safetensors"),
        ({"model": Model(network="tiny", freeze_backbone=True)}, "freeze_backbone keeps random weights"),
        ({"data": Data(name="folder", root="/nowhere")}, "nowhere"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_a_refused_recipe_leaves_no_folder(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(small(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_masks_is_refused_before_the_run(tmp_path, split):
    file = write_folder_set(tmp_path)
    file.write_text(file.read_text().replace(f", masks: {split}/masks", ""))
    with pytest.raises(DataError, match=f"of split '{split}'; give it `masks`"):
        train(small(tmp_path / "run", data=Data(name="folder", root=str(tmp_path), crop_size=(32, 32), workers=0)))
    assert not (tmp_path / "run").exists()


def test_a_batch_too_small_for_the_network_is_refused_in_words_and_leaves_no_folder(tmp_path):
    data = Data(crop_size=(32, 32), length=4, limit=4, workers=0)
    with pytest.raises(UserError, match=r"a micro-batch of 1 32x32 crops is too small for tiny; raise batch_size"):
        train(small(tmp_path / "run", data=data, batch_size=1, micro_batch=None))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("void", [True, False])
def test_a_best_model_is_named_only_where_there_is_one(tmp_path, capsys, void):
    write_folder_set(tmp_path)
    for name in ("d", "e") if void else ():
        write_mask(tmp_path / "val" / "masks" / f"{name}.png", [255])
    data = Data(name="folder", root=str(tmp_path), crop_size=(32, 32), workers=0)
    run = train(small(tmp_path / "run", data=data, steps=1, batch_size=2, checkpoint_every=0))
    said = capsys.readouterr().out
    assert "final (last step)" in said
    assert ("best on val" in said) == (run / "best").is_dir() == (not void)


def test_a_mask_that_cannot_be_read_ends_the_run_as_a_data_error(tmp_path, monkeypatch):
    def broken(*_):
        raise DataError("picture.png: truncated")

    monkeypatch.setattr("protoseg.data.dataset.read", broken)
    with pytest.raises(DataError, match=r"picture\.png"):
        train(small(tmp_path / "run"))
    assert not (tmp_path / "run").exists()  # the same command works once the picture is mended


def test_a_fault_in_the_middle_of_a_run_keeps_what_was_measured(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise DataError("picture.png: truncated")

    monkeypatch.setattr("protoseg.engine.module.score", broken)
    with pytest.raises(DataError, match=r"picture\.png"):
        train(small(tmp_path / "run"))
    assert (tmp_path / "run" / "metrics.csv").is_file()
    assert last(tmp_path / "run")["global_step"] > 0


def test_a_run_that_diverges_at_once_keeps_its_folder_to_look_into(tmp_path):
    with pytest.raises(UserError, match="no finite loss"):
        train(small(tmp_path / "run", optim=Optim(lr=1e30), steps=20, checkpoint_every=0, val_every=0, log_every=100))
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_a_full_disk_names_the_path_and_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    recipe = small(tmp_path / "run")
    save = torch.save
    written = []

    def full(checkpoint, file):
        if len(written) == 2:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        written.append(checkpoint["global_step"])
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"last\.ckpt: cannot write the checkpoint .*No space left"):
        train(recipe)
    monkeypatch.undo()
    assert last(recipe.out)["global_step"] == written[-1] == 2
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({}, 0),
        ({"LOCAL_RANK": "1"}, 1),
        ({"NODE_RANK": "1"}, 2),
        ({"NODE_RANK": "1", "LOCAL_RANK": "1"}, 3),
    ],
    ids=str,
)
def test_every_process_knows_its_rank_before_they_meet(variables, rank, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert machine.global_rank(2) == rank


def test_deterministic_algorithms_last_as_long_as_the_run_and_fill_no_fresh_memory():
    def settings():
        return torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory

    before = settings()
    with training.determinism(small(""), Machine.of(small(""))):
        assert settings() == (True, False)
    assert settings() == before
    with training.determinism(small("", deterministic=False), Machine.of(small(""))):
        assert settings() == before


def test_fewer_devices_accumulate():
    recipe = small("x", batch_size=16, micro_batch=4)
    assert Machine.of(recipe).accumulate == 4
    assert Machine.of(replace(recipe, micro_batch=None)).accumulate == 1
    assert Machine.of(replace(recipe, devices=2)).accumulate == 2


def test_training_learns(tmp_path):
    run = train(small(tmp_path / "run", steps=40, optim=Optim(lr=3e-3), checkpoint_every=0, val_every=0, log_every=4))
    losses = [float(row["ce"]) for row in metrics(run) if row["ce"]]
    assert sum(losses[-3:]) / 3 < 0.75 * losses[0]
