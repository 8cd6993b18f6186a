"""C beside the package, compiled where it runs by the compiler at hand; without one, callers take their PyTorch lines.

The library is made once and kept in `$XDG_CACHE_HOME/protoseg` (`~/.cache/protoseg`), under a name that holds source,
compiler and flags. `CC` chooses the compiler; `PROTOSEG_NATIVE=0` switches all of it off."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SECONDS = 60  # a compiler that takes longer hangs
# What PyTorch itself settled on for this CPU, so that a cache on a shared disk suits every machine that finds its name.
VECTORS = {
    "AVX512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512",
    "AVX2": "-mavx2 -mfma",
}
# The first leaves the OpenMP symbols to the runtime that PyTorch has loaded: a second pool of threads would fight it.
THREADS = ("-fopenmp", "-fopenmp-simd")


def load(source: Path) -> ctypes.CDLL | None:
    """The library made of one C file, or `None` where there is no compiler, or none that makes a library that loads."""
    compiler = _compiler()
    if compiler is None:
        return None
    vectors = VECTORS.get(torch.backends.cpu.get_cpu_capability(), "").split()
    for threads in THREADS:
        flags = ["-std=c11", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", threads, *vectors]
        try:
            return ctypes.CDLL(str(_made(source, [*compiler, *flags])))
        except (OSError, subprocess.SubprocessError) as error:
            log.debug("%s with %s: %s", source.name, threads, getattr(error, "stderr", None) or error)
    return None


def _compiler() -> list[str] | None:
    """The command of the C compiler, or `None`."""
    if os.environ.get("PROTOSEG_NATIVE", "1") == "0" or sys.platform == "win32":
        return None
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    return None


def _made(source: Path, command: list[str]) -> Path:
    """The path of the library, compiled unless it is there."""
    key = hashlib.sha256(source.read_bytes())
    key.update("\0".join([*command, _version(command[0]), sys.platform, os.uname().machine]).encode())
    library = _folder() / f"{source.stem}-{key.hexdigest()[:24]}.so"
    if not library.exists():
        # In two steps: a compiler told of OpenMP at the end would bring its own runtime along. Moved into place, so
        # that of several processes each finds all of it or nothing.
        with tempfile.TemporaryDirectory(dir=library.parent) as place:
            parts, made = Path(place, "parts.o"), Path(place, "made.so")
            _run([*command, "-c", str(source), "-o", str(parts)])
            _run([command[0], "-shared", str(parts), "-o", str(made), "-lm"])
            made.replace(library)
    return library


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout


@cache
def _version(compiler: str) -> str:
    return _run([compiler, "--version"])


@cache
def _folder() -> Path:
    """Where libraries are kept; of this process alone where nothing can be written."""
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "protoseg"
    try:
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept):
            return kept
    except OSError:
        return Path(tempfile.mkdtemp(prefix="protoseg-"))
