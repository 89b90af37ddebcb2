"""Text to tokens and back, with control tokens out of reach of what users write.

Special tokens spelled out in a text stay text unless the caller asks otherwise. In a conversation
only the template's own text makes control tokens: see `Tokenizer.encode_chat`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as Backend

from vivace.errors import BadFile, InvalidRequest, ModelNotFound, PromptTooLong, TemplateError
from vivace.models.config import show
from vivace.models.control_tokens import ControlTokens, unused_mark
from vivace.models.detokenizer import Detokenizer, make_detokenizer
from vivace.models.formats.strict_json import read_bytes, read_object
from vivace.models.templates import ChatTemplate, Messages, check_messages, find_templates

__all__ = ["Tokenizer"]

MAX_TOKENIZER_BYTES = 128 * 2**20
_PIECE_CHARACTERS = 2**16
_CUT_TOKENS = 256  # more than cutting a text in two can add
_ROLES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))


class Tokenizer:
    """A checkpoint's tokenizer.

    Args:
        backend: the tokenizer proper.
        special_tokens: texts by role, such as `eos_token`; templates see them.
        templates: chat templates by name; `default` is the usual one.
    """

    def __init__(
        self,
        backend: Backend,
        special_tokens: Mapping[str, str] | None = None,
        templates: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._lock = threading.Lock()  # guards the switch between the two ways to encode
        self.special_tokens = dict(special_tokens or {})
        self._templates = dict(templates or {})
        self._compiled: dict[str, ChatTemplate] = {}
        added = backend.get_added_tokens_decoder()
        special = {item: token for item, token in added.items() if token.special}
        self.special_ids = frozenset(special)
        # Whether special tokens could appear only after normalising a text.
        self._matches_normalized = backend.normalizer is not None and any(
            token.normalized for token in special.values()
        )
        unknown = backend.token_to_id(self.special_tokens.get("unk_token", "<unk>"))
        self._control_ids = self.special_ids - {unknown}
        self._control = ControlTokens(special.values())
        self.vocab_size = max(backend.get_vocab_size(), 1 + max(added, default=-1))

    @staticmethod
    def load(path: Path) -> Tokenizer:
        """Read `tokenizer.json` and the files beside it. Raises `BadFile`, `ModelNotFound`."""
        file = path / "tokenizer.json"
        if not file.exists():
            raise ModelNotFound(
                f"{path}: has no tokenizer.json: save the tokenizer in its fast form beside it"
            )
        config = _read_optional(path / "tokenizer_config.json")
        data = read_bytes(file, MAX_TOKENIZER_BYTES)
        backend = _guarded(str(file), lambda: Backend.from_buffer(data))
        special = _special_tokens(path, config)
        _guarded(str(file), lambda: _add_tokens(backend, config, special))
        return Tokenizer(backend, special, find_templates(path, config))

    @property
    def bos_token_id(self) -> int | None:
        return self._role_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._role_id("eos_token")

    def _role_id(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        return None if text is None else self._backend.token_to_id(text)

    @property
    def has_template(self) -> bool:
        return bool(self._templates)

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token."""
        return self._backend.id_to_token(token_id)

    # ------------------------------------------------------------ text

    def encode(
        self,
        text: str,
        add_special: bool = True,
        allow_special: bool = False,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Tokens of a text.

        `add_special` adds what the tokenizer puts around a text, such as its first token, which is
        never there twice. `allow_special` lets special tokens spelled in the text become tokens.
        With `max_tokens`, a text that is far too long is refused after a part of it, as encoding
        all of it could take minutes.

        Raises `InvalidRequest` for text that is not valid Unicode, `PromptTooLong`.
        """
        check_text(text)
        if max_tokens is not None and len(text) > _PIECE_CHARACTERS:
            self._check_length(text, max_tokens)
        encoding = self._encode(text, add_special, allow_special)
        ids = encoding.ids
        if not allow_special and not self._control_ids.isdisjoint(ids):
            return self._without_control(text, encoding)
        if allow_special and add_special and len(ids) > 1 and ids[0] == ids[1] == self.bos_token_id:
            return ids[1:]
        return ids

    def _check_length(self, text: str, max_tokens: int) -> None:
        """Count tokens by pieces, allowing for pairs cut apart, until there are too many."""
        count = 0
        for begin in range(0, len(text), _PIECE_CHARACTERS):
            piece = text[begin : begin + _PIECE_CHARACTERS]
            count += len(self._encode(piece, False, False).ids)
            end = begin + len(piece)
            if count - _CUT_TOKENS * (end // _PIECE_CHARACTERS + 1) > max_tokens:
                estimate = round(count * len(text) / end)
                raise PromptTooLong(estimate, max_tokens, is_estimate=True)

    def _encode(self, text: str, add_special: bool, allow_special: bool) -> Encoding:
        with self._lock:
            self._backend.encode_special_tokens = not allow_special
            return self._backend.encode(text, add_special_tokens=add_special)

    def _without_control(self, text: str, encoding: Encoding) -> list[int]:
        """Encode again where a vocabulary holds special tokens as words of its own: cut them.

        What the tokenizer put around the text stays.
        """
        ids, added = encoding.ids, encoding.special_tokens_mask
        begin = next((i for i, flag in enumerate(added) if not flag), len(added))
        end = next((i for i in range(len(added), begin, -1) if not added[i - 1]), begin)
        found = [i for i in range(begin, end) if ids[i] in self._control_ids]
        if not found:
            return ids
        offsets = encoding.offsets
        cuts = [cut for cut in (offsets[i][0] + 1 for i in found) if cut < len(text)]
        if not cuts:
            return ids
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)]) if a < b]
        plain = [item for piece in pieces for item in self.encode(piece, add_special=False)]
        return [*ids[:begin], *plain, *ids[end:]]

    def decode(self, token_ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of tokens; bytes that are not UTF-8 become U+FFFD."""
        known = [int(item) for item in token_ids if 0 <= item < self.vocab_size]
        return self._backend.decode(known, skip_special_tokens=skip_special)

    def detokenizer(self, before: Sequence[int] = (), skip_special: bool = True) -> Detokenizer:
        """A stream whose pieces join to what `decode` adds for them behind the tokens `before`."""
        skipped = self.special_ids if skip_special else frozenset()
        return make_detokenizer(self._backend, skipped, before)

    # ------------------------------------------------------------ conversations

    def render_chat(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text that the chat template makes of a conversation; for display.

        Raises `TemplateError`, `InvalidRequest`.
        """
        template = self._template("tool_use" if tools else "default")
        return template.render(
            messages, tools, add_generation_prompt, self.special_tokens | variables
        )

    def encode_chat(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        max_tokens: int | None = None,
        **variables: Any,
    ) -> list[int]:
        """Tokens of a conversation; `max_tokens` as in `encode`.

        Special tokens in the template become tokens; those spelled by users, whole or in parts that
        would join, are marked before rendering and stay text.

        Raises `TemplateError`, `InvalidRequest`, `PromptTooLong`.
        """
        inputs = (check_messages(messages), tools or (), variables)
        mark = unused_mark(inputs)
        messages, shielded_tools, variables = (self._control.shield(x, mark) for x in inputs)
        text = self.render_chat(messages, shielded_tools, add_generation_prompt, **variables)
        check_text(text)
        if max_tokens is not None and len(text) > _PIECE_CHARACTERS:
            self._check_length(text, max_tokens)
        if mark not in text and not self._matches_normalized:
            return self.encode(text, add_special=False, allow_special=True)
        ids: list[int] = []
        for piece, is_special in self._control.split(text, mark):
            if is_special:
                token_id = self._backend.token_to_id(piece)
                assert token_id is not None
                ids.append(token_id)
            elif piece:
                ids += self.encode(piece, add_special=False)
        return ids

    def _template(self, name: str) -> ChatTemplate:
        name = name if name in self._templates else "default"
        if name not in self._templates:
            known = ", ".join(sorted(self._templates))
            hint = f"it has {known}, none of them 'default'" if known else "it has none"
            raise TemplateError(f"the model has no chat template ({hint}): use a plain prompt")
        if name not in self._compiled:
            self._compiled[name] = ChatTemplate(self._templates[name])
        return self._compiled[name]


def check_text(text: str) -> None:
    """Raises `InvalidRequest` for anything but a string that UTF-8 can hold."""
    if not isinstance(text, str):
        raise InvalidRequest(f"text is {show(text)}: expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"text has a lone surrogate at character {error.start}: expected valid Unicode"
        ) from error


# ---------------------------------------------------------------- files


def _read_optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


def _guarded(source: str, action: Callable[[], Any]) -> Any:
    """Run the native tokenizer; its errors and panics become ours."""
    try:
        return action()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in native code is not an Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise BadFile(f"{source}: is not a tokenizer ({reason}): download it again") from error


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
