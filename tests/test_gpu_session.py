"""The session goes on when an item fails, ends in time, and a second call does what is left."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmarks import gpu_session
from benchmarks.gpu import search
from benchmarks.gpu_session import Item, run, run_item, table

ROOT = Path(__file__).parents[1]
WRITE = "import json, sys; json.dump({'answer': 42}, open(sys.argv[1], 'w')); print('written')"


def item(name, code="print('said')", *arguments, seconds=30.0, **named):
    return Item(name, seconds, (("-c", code, *arguments),), **named)


def test_two_items_end_to_end(tmp_path, capsys):
    items = [
        item("measured", WRITE, "{json}", tell=lambda results: f"it is {results[0]['answer']}"),
        Item("side by side", 30, (("-c", "print('one')"), ("-c", "print('two')"))),
    ]
    summary = run(items, tmp_path, 1)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    measured = summary["items"]["measured"]
    assert (measured["state"], measured["told"], measured["results"]) == ("done", "it is 42", [{"answer": 42}])
    assert summary["items"]["side by side"]["told"] == "one; two"
    log = (tmp_path / "session.log").read_text()
    assert log.index("written") < log.index("two")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["session.log", "summary.json"]
    assert "it is 42" in table(items, summary)


def test_a_failure_is_told_and_does_not_stop_the_rest(tmp_path):
    items = [
        item("broken", "print('so far'); raise RuntimeError('no such kernel')", "{json}", tell=lambda results: "fine"),
        Item("one of two", 30, (("-c", "print('well')"), ("-c", "import sys; sys.exit(3)"))),
        item("strange", "print('no results')", tell=lambda results: results[0]["ms"]),
        item("sound"),
    ]
    found = run(items, tmp_path, 1)["items"]
    assert [found[each.name]["state"] for each in items] == ["failed", "failed", "done", "done"]
    assert found["broken"]["told"] == "RuntimeError: no such kernel"
    assert found["one of two"]["codes"] == [0, 3]
    assert "results not understood" in found["strange"]["told"]
    assert "so far" in (tmp_path / "session.log").read_text()


def test_a_second_call_does_what_is_left_and_first_what_was_not_tried(tmp_path):
    told = tmp_path / "order"
    note = "import sys; print('again', file=open(sys.argv[1], 'a')) if len(sys.argv) < 3 else sys.exit(1)"
    named = "import sys; print(sys.argv[2], file=open(sys.argv[1], 'a'))"
    out = tmp_path / "out"
    run([item("done", note, str(told)), item("failed", note, str(told), "fails")], out, 1)
    items = [
        item("done", note, str(told)),
        item("failed", named, str(told), "failed"),
        item("new", named, str(told), "new"),
    ]
    summary = run(items, out, 1)
    assert told.read_text().split() == ["again", "new", "failed"]
    assert {found["state"] for found in summary["items"].values()} == {"done"}
    run(items, out, 1, again=True)
    assert told.read_text().split()[3:] == ["again", "failed", "new"]


def test_an_item_that_takes_too_long_is_ended_with_its_children(tmp_path):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]])"
    late = "import sys, time; time.sleep(6); open(sys.argv[1], 'w').close()"
    start = time.monotonic()
    found = run_item(item("late", child, late, str(tmp_path / "came")), 2, tmp_path / "log")
    assert found["state"] == "late"
    assert time.monotonic() - start < 5
    time.sleep(max(0.0, start + 8.5 - time.monotonic()))
    assert not (tmp_path / "came").exists()


def test_what_has_no_time_left_is_not_begun(tmp_path):
    items = [item("long", seconds=60.0), item("short", seconds=10.0)]
    summary = run(items, tmp_path, (gpu_session.KEPT + 20) / 60)
    assert list(summary["items"]) == ["short"]
    assert "not yet" in table(items, summary)


def test_files_go_into_the_room_and_out_of_it(tmp_path):
    (tmp_path / "camvid-last.ckpt").write_text("step 7")
    whole = gpu_session.camvid("DATA", "cpu", tmp_path)
    copy = "import shutil, sys; shutil.copy(sys.argv[1] + '/checkpoints/last.ckpt', sys.argv[1] + '/metrics.csv')"
    short = item("camvid", copy, "{room}/run", before=whole.before, after=whole.after)
    assert run_item(short, 30, tmp_path / "log")["state"] == "done"
    assert (tmp_path / "camvid-metrics.csv").read_text() == "step 7"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_item_of_a_plan_is_a_command_there_is(device):
    items = gpu_session.plan(device)
    assert len({each.name for each in items}) == len(items)
    for each in items:
        for command in each.commands:
            assert command[0] == "-m"
            if command[1].startswith("benchmarks."):
                assert (ROOT / f"{command[1].replace('.', '/')}.py").is_file()
            else:
                assert any((ROOT / part).is_file() for part in command), command


def test_options_of_the_plan_are_options_of_the_benchmarks():
    """A wrong option would cost an item of a session that cannot be repeated."""
    for each in gpu_session.plan("cuda"):
        for command in each.commands:
            name = command[1].removeprefix("benchmarks.")
            if name in ("gpu_session", "pytest"):
                continue
            text = (ROOT / "benchmarks" / f"{name}.py").read_text()
            for option in (part for part in command if part.startswith("--")):
                assert f'"{option}"' in text, (name, option)


def test_the_command_line_says_what_it_would_do(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_session", "--out", str(tmp_path / "none"), "--dry-run"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "python -m benchmarks.head --full" in told
    assert not (tmp_path / "none").exists()


def test_sizes_are_searched_one_at_a_time():
    similarity = pytest.importorskip("protoseg.kernels.gpu.similarity")
    start = similarity.Blocks(64, 16, 64, 16, 4, 2)
    choices = {"rows": (64, 128), "classes": (16, 32, 64), "warps": (4, 8)}

    def measure(b):
        return None if b.classes == 64 else 1 / b.rows + 1 / b.classes + b.warps

    found = search(start, choices, measure, time.monotonic() + 60)
    assert found[0][1] == similarity.Blocks(128, 32, 64, 16, 4, 2)
    assert all(b.classes != 64 for _, b in found)
    assert [b for _, b in search(start, choices, measure, time.monotonic() - 1)] == [start]
