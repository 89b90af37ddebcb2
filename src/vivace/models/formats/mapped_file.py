"""A file as mapped memory."""

from __future__ import annotations

import contextlib
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

from vivace.errors import BadFile

__all__ = ["Identity", "MappedFile", "map_file"]

# Path, bytes, and when content and inode changed last, in nanoseconds: what tells a file from
# others, and from itself when it has changed. No program can set the last one back.
Identity = tuple[str, int, int, int]


@dataclass(frozen=True, slots=True)
class MappedFile:
    """The bytes of a file, and what it was when it was mapped."""

    data: mmap.mmap
    identity: Identity

    def release(self) -> None:
        """Let go of the pages that were read, where the system can; reading maps them again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.data.madvise(mmap.MADV_DONTNEED)

    def prefer_huge_pages(self) -> None:
        """Where the system can: for files that are read whole, not here and there."""
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                self.data.madvise(mmap.MADV_HUGEPAGE)


def map_file(path: Path, min_bytes: int, kind: str) -> MappedFile:
    """Map a regular file of at least `min_bytes` for reading; `kind` names what was expected.

    Raises `BadFile`.
    """
    try:
        if not path.is_file():
            raise BadFile(f"{path}: is missing or not a file: download the model again")
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size < min_bytes:
                raise BadFile(
                    f"{path}: has {status.st_size} bytes, too few for {kind}: download again"
                )
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise BadFile(f"{path}: cannot be read ({error.strerror}): check the file") from error
    times = status.st_mtime_ns, status.st_ctime_ns
    return MappedFile(data, (os.path.realpath(path), status.st_size, *times))
