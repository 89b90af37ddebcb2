"""Files and folders that appear whole or not at all: written under another name until then.

Whoever writes holds a lock. So what a killed process left behind is known, and removed by the next.
"""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

__all__ = ["remove_leftovers", "whole_file", "whole_folder"]

_TOKEN_DIGITS, _SUFFIX = 16, ".unfinished"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write what becomes the file `path` at the end, and replaces the one that is there.

    After an error nothing is left of it. Raises `OSError`.
    """
    with _held(path, Path.touch) as unfinished:
        yield unfinished
        unfinished.replace(path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder that becomes `path` at the end, which is not there or empty; on the disk, too.

    After an error nothing is left of it. Raises `OSError`.
    """
    with _held(path, Path.mkdir) as unfinished:
        yield unfinished
        _sync_all(unfinished)
        unfinished.replace(path)
        _sync(path.parent)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left in a folder, of `name` or of all, where that can be done.

    Nothing happens on systems without locks.
    """
    of_name = "*" if name is None else glob.escape(name)
    for path in folder.glob(f".{of_name}.{'[0-9a-f]' * _TOKEN_DIGITS}{_SUFFIX}"):
        lock = _lock(path)
        if lock is not None:
            _remove(path)
            os.close(lock)


@contextmanager
def _held(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    remove_leftovers(path.parent, path.name)
    new = path.with_name(f".{path.name}.{secrets.token_hex(_TOKEN_DIGITS // 2)}")
    lock = None
    try:
        make(new)
        lock = _lock(new)
        unfinished = new.rename(f"{new}{_SUFFIX}")  # nobody sees it before it is locked
        try:
            yield unfinished
        finally:
            _remove(unfinished)
    except OSError as error:
        # By the name that was asked for; a full disk gives none.
        if error.filename is None or str(error.filename).startswith(str(new)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _lock(path: Path) -> int | None:
    """The descriptor that holds a lock until it is closed; None where there is none to be had."""
    if sys.platform == "win32":
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process has it, or the file system has no locks
        os.close(descriptor)
        return None
    return descriptor


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_all(folder: Path) -> None:
    """Wait until the disk has all files below a folder, and their names."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
