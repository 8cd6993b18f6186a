"""Files that are there whole or not at all."""

import json
import os
import stat

import pytest

from protoseg.config import UserError
from protoseg.tasks.files import counted, several, write_json, write_whole


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "deep" / "report.json"
    write_whole(path, lambda fresh: fresh.write_text("old"))

    def broken(fresh):
        fresh.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"report\.json: cannot be written.*No space"):
        write_whole(path, broken)
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_one_of_a_thing_is_not_several():
    assert [several(n, "image") for n in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert [several(n, "class", "classes") for n in (1, 3)] == ["1 class", "3 classes"]


def test_files_get_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        path = write_whole(tmp_path / "a.txt", lambda fresh: fresh.write_text("x"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_json_is_strict_and_its_strings_are_untouched(tmp_path):
    content = {
        "name": "a [ 1,  2 ] \n[\n b",
        "iou": [1.5, float("nan")],
        "table": [[1, 2], [3, 4]],
        "one": (float("inf"),),
    }
    text = write_json(tmp_path / "a.json", content).read_text()
    assert json.loads(text) == {
        "name": content["name"], "iou": [1.5, None], "table": [[1, 2], [3, 4]], "one": [None],
    }  # fmt: skip
    assert "[3, 4]" in text
    assert "NaN" not in text


def test_counting_is_silent_where_nobody_watches(capsys):
    assert list(counted("abc", 3, "letters")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
