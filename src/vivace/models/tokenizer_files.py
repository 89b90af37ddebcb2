"""Tokenizers as checkpoints keep them: `tokenizer.json` and the files beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from vivace.errors import BadFile, ModelNotFound
from vivace.models.formats.strict_json import read_bytes, read_object
from vivace.models.templates import find_templates

__all__ = ["MAX_TOKENIZER_BYTES", "guarded", "read_tokenizer"]

MAX_TOKENIZER_BYTES = 128 * 2**20
_ROLES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))


def read_tokenizer(path: Path) -> tuple[Backend, dict[str, str], dict[str, str]]:
    """The tokenizer of a directory, its special tokens by role, and its templates by name.

    Raises `BadFile`, `ModelNotFound`.
    """
    file = path / "tokenizer.json"
    if not file.exists():
        raise ModelNotFound(
            f"{path}: has no tokenizer.json: save the tokenizer in its fast form beside it"
        )
    config = _read_optional(path / "tokenizer_config.json")
    data = read_bytes(file, MAX_TOKENIZER_BYTES)
    backend = guarded(str(file), lambda: Backend.from_buffer(data))
    special = _special_tokens(path, config)
    guarded(str(file), lambda: _add_tokens(backend, config, special))
    return backend, special, find_templates(path, config)


def guarded(source: str, action: Callable[[], Any]) -> Any:
    """Run the native tokenizer; its errors and panics become ours. `source` names the file."""
    try:
        return action()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in native code is not an Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise BadFile(f"{source}: is not a tokenizer ({reason}): download it again") from error


def _read_optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


def _special_tokens(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Texts of special tokens by role; `tokenizer_config.json` wins over the special tokens map."""
    found = {}
    for values in (_read_optional(path / "special_tokens_map.json"), config):
        for role in _ROLES:
            value = values.get(role)
            if isinstance(value, Mapping):
                value = value.get("content")
            if isinstance(value, str) and value:
                found[role] = value
    return found


def _add_tokens(backend: Backend, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Add the tokens of `tokenizer_config.json` that `tokenizer.json` lacks, at their ids."""
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder", {})
    if not isinstance(listed, Mapping):
        raise ValueError("added_tokens_decoder is not an object")
    for token_id, fields in sorted(listed.items(), key=lambda item: int(item[0])):
        content = fields["content"]
        if content in known:
            continue
        flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
        given = {flag: bool(fields[flag]) for flag in flags if flag in fields}
        backend.add_tokens([AddedToken(content, **given)])
        if backend.token_to_id(content) != int(token_id):
            raise ValueError(f"added token {content!r} does not get its id {token_id}")
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    extra = [item.get("content") if isinstance(item, Mapping) else item for item in extra]
    for content in (*special.values(), *(item for item in extra if isinstance(item, str))):
        token = known.get(content)
        if backend.token_to_id(content) is not None and (token is None or not token.special):
            backend.add_special_tokens([content])
