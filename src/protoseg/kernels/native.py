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
from torch import Tensor

log = logging.getLogger(__name__)

TYPES = {torch.float32: "float", torch.float64: "double"}  # a file has its functions for both
NO_MEMORY, OUT_OF_RANGE = 1, 2  # what they return where something is wrong
REAL = (Tensor, torch.nn.Parameter)  # not what stands for a tensor while a program is traced
SECONDS = 60  # a compiler that takes longer hangs
FLAGS = ("-std=c11", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
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
        flags = [*FLAGS, threads, *vectors]
        try:
            return ctypes.CDLL(str(_made(source, [*compiler, *flags])))
        except (OSError, subprocess.SubprocessError) as error:
            log.debug("%s with %s: %s", source.name, threads, getattr(error, "stderr", None) or error)
    return None


def alike(*tensors: Tensor) -> bool:
    """Whether these floating tensors are all on the CPU and of one of the types."""
    dtype = tensors[0].dtype
    return dtype in TYPES and all(t.dtype == dtype and t.device.type == "cpu" for t in tensors)


def takes(*tensors: Tensor) -> bool:
    """Whether C could read these floating tensors: `alike`, with memory of their own."""
    return alike(*tensors) and all(type(t) in REAL for t in tensors)


def call(library: ctypes.CDLL | None, function: str, *arguments: Tensor | int | float | None) -> None:
    """A function of a library; tensors go as addresses, None as no address.

    Raises:
        MemoryError, IndexError: what the function says.
    """
    c: list[object] = []
    for value in arguments:
        if value is None or isinstance(value, Tensor):
            c.append(ctypes.c_void_p(None if value is None else value.data_ptr()))
        else:
            c.append(ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value))
    fault = getattr(library, function)(*c)
    if fault == NO_MEMORY:
        raise MemoryError(f"{function} found no memory")
    if fault == OUT_OF_RANGE:
        raise IndexError(f"{function} was given a class or prototype that the memory does not have")


def typed(function: str, like: Tensor) -> str:
    """The function for numbers of this type."""
    return f"{function}_{TYPES[like.dtype]}"


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
    for header in sorted(source.parent.glob("*.h")):
        key.update(header.read_bytes())
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
