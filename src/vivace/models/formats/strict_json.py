"""JSON as checkpoints use it: an object, bounded in size and structure, without repeated keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vivace.errors import BadFile

__all__ = ["parse_object", "read_bytes", "read_object"]

MAX_FILE_BYTES = 32 * 2**20
MAX_STRUCTURE = 2_500_000  # brackets, braces, colons and commas: what costs memory when parsed


def read_object(path: Path, max_bytes: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """The object in a JSON file. Raises `BadFile`."""
    return parse_object(read_bytes(path, max_bytes), str(path))


def read_bytes(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """A whole file that is at most `max_bytes` long. Raises `BadFile`."""
    try:
        if not path.is_file():
            raise BadFile(f"{path}: is not a regular file: expected a file of this name")
        size = path.stat().st_size
        if size > max_bytes:
            raise BadFile(f"{path}: has {size} bytes: expected at most {max_bytes}")
        return path.read_bytes()
    except OSError as error:
        raise BadFile(f"{path}: cannot be read ({error.strerror}): check the file") from error


def parse_object(data: bytes, source: str) -> dict[str, Any]:
    """Parse an object; `source` names it in messages. Raises `BadFile`."""
    if not data.strip():
        raise BadFile(f"{source}: is empty: download it again")
    if sum(data.count(sign) for sign in (b"[", b"{", b":", b",")) > MAX_STRUCTURE:
        raise BadFile(f"{source}: has more than {MAX_STRUCTURE} JSON elements: not a checkpoint's")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise BadFile(f"{source}: is not UTF-8 at byte {error.start}: download it again") from error
    except RecursionError as error:
        raise BadFile(f"{source}: is nested too deeply: expected a plain object") from error
    except json.JSONDecodeError as error:
        raise BadFile(
            f"{source}: is not JSON ({error.msg}, character {error.pos}): download it again"
        ) from error
    except ValueError as error:  # duplicate keys, or a number of thousands of digits
        reason = str(error).partition("\n")[0][:120]
        raise BadFile(f"{source}: is not valid ({reason}): download it again") from error
    if not isinstance(value, dict):
        raise BadFile(f"{source}: holds a {type(value).__name__}: expected a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:60]!r} appears twice")
            seen.add(key)
    return values
