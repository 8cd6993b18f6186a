import ctypes
from pathlib import Path

import pytest

from protoseg.kernels import native

SOURCE = "int twice(int x) { return 2 * x; }\n"


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A C file, a cache of its own and whatever compiler the machine has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PROTOSEG_NATIVE", raising=False)
    native._folder.cache_clear()
    yield tmp_path / "twice.c"
    native._folder.cache_clear()


def kept(source: Path) -> list[Path]:
    return list((source.parent / "cache" / "protoseg").glob("*.so"))


needs_compiler = pytest.mark.skipif(native._compiler() is None, reason="no C compiler")


@needs_compiler
def test_a_library_is_compiled_once(source, monkeypatch):
    source.write_text(SOURCE)
    assert native.load(source).twice(21) == 42
    (made,) = kept(source)
    monkeypatch.setattr(native, "_run", lambda command: pytest.fail(f"compiled again: {command}"))
    assert native.load(source)._name == str(made)


@needs_compiler
def test_another_source_or_compiler_flag_is_another_library(source, monkeypatch):
    source.write_text(SOURCE)
    native.load(source)
    source.write_text(SOURCE.replace("2 * x", "3 * x"))
    assert native.load(source).twice(2) == 6
    monkeypatch.setenv("CC", "cc -DUNUSED")
    assert native.load(source).twice(2) == 6
    assert len(kept(source)) == 3


@needs_compiler
def test_half_a_library_is_never_found(source):
    source.write_text(SOURCE)
    native.load(source)
    assert [path.suffix for path in (source.parent / "cache" / "protoseg").iterdir()] == [".so"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("PROTOSEG_NATIVE", "0"), ("CC", "no-such-compiler"), ("CC", "false"), ("PATH", "")],
    ids=["switched off", "missing", "failing", "empty path"],
)
def test_without_a_compiler_there_is_no_library_and_no_error(source, monkeypatch, name, value):
    source.write_text(SOURCE)
    monkeypatch.delenv("CC", raising=False)
    native._version.cache_clear()
    monkeypatch.setenv(name, value)
    assert native.load(source) is None


@needs_compiler
def test_a_source_that_does_not_compile_is_no_library(source):
    source.write_text("int twice(int x) { return 2 * ; }\n")
    assert native.load(source) is None
    assert kept(source) == []


@needs_compiler
def test_threads_that_cannot_be_had_are_left_out(source, monkeypatch):
    source.write_text(SOURCE)
    real = ctypes.CDLL

    def refuse_the_first(path, refused=[]):  # noqa: B006
        if not refused:
            refused.append(path)
            raise OSError("undefined symbol: GOMP_parallel")
        return real(path)

    monkeypatch.setattr(native.ctypes, "CDLL", refuse_the_first)
    assert native.load(source).twice(4) == 8


@needs_compiler
def test_where_nothing_can_be_kept_it_is_compiled_for_this_process(source, monkeypatch, tmp_path):
    source.write_text(SOURCE)
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert native.load(source).twice(5) == 10
