"""`metrics.csv` stays one table, whatever is killed when."""

import csv

import pytest

from protoseg.engine.reporting import MetricsFile, duration


def table(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_columns_grow_as_they_come(tmp_path):
    file = MetricsFile(tmp_path / "metrics.csv")
    file.add({"step": 1, "loss": 0.5})
    file.add({"step": 1, "val/miou": 0.25})
    file.add({"step": 2, "loss": 0.125})
    assert table(file.path) == [["step", "loss", "val/miou"], ["1", "0.5", ""], ["1", "", "0.25"], ["2", "0.125", ""]]


def test_a_continued_run_writes_later_rows_again(tmp_path):
    path = tmp_path / "metrics.csv"
    for step in (1, 2, 3):
        MetricsFile(path, step).add({"step": step, "loss": step})
    MetricsFile(path, 1).add({"step": 2, "loss": 7})
    assert table(path) == [["step", "loss"], ["1", "1"], ["2", "7"]]


def test_a_validation_that_is_repeated_replaces_its_row(tmp_path):
    file = MetricsFile(tmp_path / "metrics.csv")
    file.add({"step": 4, "loss": 1})
    file.add({"step": 4, "val/miou": 0.5})
    file.add({"step": 4, "val/miou": 0.75})
    assert table(file.path)[1:] == [["4", "1", ""], ["4", "", "0.75"]]


@pytest.mark.parametrize("rest", ["2,0.1", "2", "2,0.125,0.5,7", ""])
def test_half_a_last_line_is_dropped(tmp_path, rest):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,val/miou\n1,0.5,\n" + rest)
    file = MetricsFile(path, 5)
    file.add({"step": 2, "loss": 0.25})
    assert table(path) == [["step", "loss", "val/miou"], ["1", "0.5", ""], ["2", "0.25", ""]]


def test_durations():
    assert [duration(s) for s in (0, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]
