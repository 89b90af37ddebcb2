"""A file as mapped memory."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

from vivace.errors import BadFile

__all__ = ["map_file", "release"]


def map_file(path: Path, min_bytes: int, kind: str) -> mmap.mmap:
    """Map a regular file of at least `min_bytes` for reading; `kind` names what was expected.

    Raises `BadFile`.
    """
    try:
        if not path.is_file():
            raise BadFile(f"{path}: is missing or not a file: download the model again")
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < min_bytes:
                raise BadFile(f"{path}: has {size} bytes, too few for {kind}: download again")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise BadFile(f"{path}: cannot be read ({error.strerror}): check the file") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            data.madvise(mmap.MADV_HUGEPAGE)
    return data


def release(data: mmap.mmap) -> None:
    """Let go of the pages that were read, where the system can; reading maps them again."""
    if hasattr(mmap, "MADV_DONTNEED"):
        data.madvise(mmap.MADV_DONTNEED)
