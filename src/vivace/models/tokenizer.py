"""Text to tokens and back, with control tokens out of reach of what users write.

Special tokens spelled out in a text stay text unless the caller asks otherwise. In a conversation
only the template's own text makes control tokens: see `Tokenizer.encode_chat`.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from vivace.errors import InvalidRequest, PromptTooLong, TemplateError
from vivace.models.config import show
from vivace.models.control_tokens import ControlTokens, unused_mark
from vivace.models.detokenizer import Detokenizer, Pieces, make_detokenizer
from vivace.models.segmentation import Encoded, Joined, Segmenter, Tokenization, check_tokenization
from vivace.models.spans import TokenSpan, covering_spans
from vivace.models.templates import ChatTemplate, Messages, check_messages
from vivace.models.tokenizer_files import read_tokenizer

__all__ = ["Tokenizer"]

_PIECE_CHARACTERS = 2**16
_CUT_TOKENS = 256  # more than cutting a text in two can add


class Tokenizer:
    """A checkpoint's tokenizer.

    Args:
        backend: the tokenizer proper.
        special_tokens: texts by role, such as `eos_token`; templates see them.
        templates: chat templates by name; `default` is the usual one.
        pieces: the bytes of each token; None: the backend's decoder says what tokens spell.
        eog_token_ids: tokens that end an answer; None: the `eos_token`.
        tokenization: by the vocabulary's `merges`, or without: see `Segmenter`.
    Raises:
        InvalidOption: the vocabulary has no such tokenization.
    """

    def __init__(
        self,
        backend: Backend,
        special_tokens: Mapping[str, str] | None = None,
        templates: Mapping[str, str] | None = None,
        pieces: Pieces | None = None,
        eog_token_ids: Collection[int] | None = None,
        tokenization: Tokenization = "merges",
    ) -> None:
        check_tokenization(tokenization)
        self._segmenter = None if tokenization == "merges" else Segmenter(backend, tokenization)
        if self._segmenter is not None:
            backend = self._segmenter.backend
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._pieces = pieces
        self._lock = threading.Lock()  # guards the switch between the two ways to encode
        self.special_tokens = dict(special_tokens or {})
        self.templates = dict(templates or {})
        self._compiled: dict[str, ChatTemplate] = {}
        added = backend.get_added_tokens_decoder()
        self.added_ids = frozenset(added)
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
        eos = self.eos_token_id
        own = () if eos is None else (eos,)
        self.eog_token_ids = frozenset(own if eog_token_ids is None else eog_token_ids)

    @staticmethod
    def load(path: Path, tokenization: Tokenization = "merges") -> Tokenizer:
        """Read `tokenizer.json` and the files beside it.

        Raises `BadFile`, `ModelNotFound`, `InvalidOption`.
        """
        return Tokenizer(*read_tokenizer(path), tokenization=tokenization)

    def without_merges(self, tokenization: Tokenization) -> Tokenizer:
        """The same vocabulary with another way to tokenize. Raises `InvalidOption`."""
        return Tokenizer(
            self._backend,
            self.special_tokens,
            self.templates,
            self._pieces,
            self.eog_token_ids,
            tokenization,
        )

    def to_json(self) -> str:
        """All but templates and roles of tokens, as in a tokenizer.json."""
        return self._backend.to_str()

    def to_state(self) -> dict[str, Any]:
        """What `to_json` says."""
        return json.loads(self.to_json())

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
        return bool(self.templates)

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
        encoded = self._encode(text, add_special, allow_special)
        ids = encoded.ids
        if not allow_special and not self._control_ids.isdisjoint(ids):
            return self._without_control(text, encoded).ids
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

    def _encode(self, text: str, add_special: bool, allow_special: bool) -> Encoded:
        with self._lock:
            self._backend.encode_special_tokens = not allow_special
            encoding = self._backend.encode(text, add_special_tokens=add_special)
        return encoding if self._segmenter is None else self._segmenter(encoding)

    def encode_with_offsets(
        self, text: str, add_special: bool = True, allow_special: bool = False
    ) -> list[TokenSpan]:
        """The tokens that `encode` gives, each with the characters of `text` it stands for.

        See `covering_spans` for what spans mean. Raises `InvalidRequest`.
        """
        check_text(text)
        encoded = self._encode(text, add_special, allow_special)
        if not allow_special and not self._control_ids.isdisjoint(encoded.ids):
            encoded = self._without_control(text, encoded)
        rows = covering_spans(encoded, len(text), self._backend.token_to_id("▁"))
        is_twice = len(rows) > 1 and rows[0].token_id == rows[1].token_id == self.bos_token_id
        return rows[1:] if allow_special and add_special and is_twice else rows

    def _without_control(self, text: str, encoded: Encoded) -> Encoded:
        """Encode again where a vocabulary holds special tokens as words of its own: cut them.

        What the tokenizer put around the text stays.
        """
        ids, offsets, mask = encoded.ids, encoded.offsets, encoded.special_tokens_mask
        begin = next((i for i, flag in enumerate(mask) if not flag), len(mask))
        end = next((i for i in range(len(mask), begin, -1) if not mask[i - 1]), begin)
        found = [i for i in range(begin, end) if ids[i] in self._control_ids]
        cuts = [cut for cut in (offsets[i][0] + 1 for i in found) if cut < len(text)]
        if not cuts:
            return encoded
        pieces = [
            (a, self._plain(text[a:b]))
            for a, b in itertools.pairwise([0, *cuts, len(text)])
            if a < b
        ]
        plain = [item for _, piece in pieces for item in piece.ids]
        moved = [(at + a, at + b) for at, piece in pieces for a, b in piece.offsets]
        return Joined(
            [*ids[:begin], *plain, *ids[end:]],
            [*offsets[:begin], *moved, *offsets[end:]],
            [*mask[:begin], *(0 for _ in plain), *mask[end:]],
        )

    def _plain(self, text: str) -> Encoded:
        encoded = self._encode(text, False, False)
        is_plain = self._control_ids.isdisjoint(encoded.ids)
        return encoded if is_plain else self._without_control(text, encoded)

    def decode(self, token_ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of tokens; bytes that are not UTF-8 become U+FFFD."""
        known = [int(item) for item in token_ids if 0 <= item < self.vocab_size]
        if self._pieces is None:
            return self._backend.decode(known, skip_special_tokens=skip_special)
        stream = self.detokenizer(skip_special=skip_special)
        return "".join(map(stream.add, known)) + stream.finish()

    def detokenizer(self, before: Sequence[int] = (), skip_special: bool = True) -> Detokenizer:
        """A stream whose pieces join to what `decode` adds for them behind the tokens `before`."""
        skipped = self.special_ids if skip_special else frozenset()
        if self._pieces is not None:
            return self._pieces.detokenizer(skipped, before)
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
        name = name if name in self.templates else "default"
        if name not in self.templates:
            known = ", ".join(sorted(self.templates))
            hint = f"it has {known}, none of them 'default'" if known else "it has none"
            raise TemplateError(f"the model has no chat template ({hint}): use a plain prompt")
        if name not in self._compiled:
            self._compiled[name] = ChatTemplate(self.templates[name])
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
