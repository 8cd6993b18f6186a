"""Files that are there whole or not at all, and a line that says how far a verb has come."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from protoseg.config import UserError

T = TypeVar("T")


def write_whole(path: Path, write: Callable[[Path], Any]) -> Path:
    """Let `write` fill a temporary neighbour of `path`, then rename it: nobody ever sees half a file.

    The neighbour keeps the suffix, by which Pillow and others choose the format.

    Raises:
        UserError: the folder cannot be made or written, or the disk is full; names the path.
    """
    fresh = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, fresh = tempfile.mkstemp(prefix=f".{path.stem[:60]}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        write(Path(fresh))
        os.chmod(fresh, 0o666 & ~_umask())
        os.replace(fresh, path)
    except OSError as fault:
        raise UserError(f"{path}: cannot be written ({fault}); free the disk or choose another folder") from fault
    finally:
        if fresh and os.path.exists(fresh):
            os.unlink(fresh)
    return path


def refuse_unwritable(path: Path) -> None:
    """Find out before the work, and without leaving anything behind, that its result could not be written.

    Raises:
        UserError: `path` is a folder, or the nearest folder above it that exists cannot be written.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=above).close()
    except OSError as fault:
        raise UserError(f"{path}: cannot be written ({fault}); choose another folder") from fault


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, content: Any) -> Path:
    """Indented UTF-8 JSON, a list of numbers on one line; numbers that are not finite become null, as JSON has none."""
    text = json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # a line break after the bracket: strings hold none, so this is never inside one
    text = re.sub(r"\[\n([^\[\]{}\"]*)\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    return write_whole(path, lambda fresh: fresh.write_text(text, encoding="utf-8"))


def finite(content: Any) -> Any:
    """Nested plain data with NaN and infinities as None."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return content


def several(count: int, one: str, many: str = "") -> str:
    """ "1 image", "2 images"; `many` where it is not `one` with an s."""
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def counted(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """`items`, with "what 12/233" on the terminal's last line; silent where stderr is no terminal."""
    shown = sys.stderr.isatty()
    for number, item in enumerate(items, 1):
        if shown:
            print(f"\r{what} {number}/{total}", end="", file=sys.stderr, flush=True)
        yield item
    if shown:
        print("\r" + " " * (len(what) + 2 * len(str(total)) + 2) + "\r", end="", file=sys.stderr, flush=True)
