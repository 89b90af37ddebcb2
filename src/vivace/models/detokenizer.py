"""Text from a stream of tokens: pieces that join to exactly what decoding all of them gives.

A piece never ends inside a UTF-8 character. The cost per token does not grow with the stream.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from tokenizers import Tokenizer as Backend

__all__ = ["Detokenizer", "Pieces", "bytes_of_letters", "make_detokenizer"]


class Detokenizer(Protocol):
    def add(self, token_id: int) -> str:
        """Take a token; returns the text that is now certain."""
        ...

    def finish(self) -> str:
        """The rest of the text, at the end of the stream."""
        ...


class Pieces:
    """The bytes of each token of a vocabulary where they do not depend on the tokens around it.

    With `drops_space`, the space that begins a text is left out.
    """

    def __init__(self, pieces: Iterable[bytes], drops_space: bool) -> None:
        self._pieces = tuple(pieces)
        self.drops_space = drops_space

    def of(self, token_id: int) -> bytes:
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else b""

    def detokenizer(self, skipped: frozenset[int], before: Sequence[int] = ()) -> Detokenizer:
        """A detokenizer that leaves out the tokens `skipped`, behind the tokens `before`."""
        continues = any(self.of(item) for item in before if item not in skipped)
        return _ByteStream(self.of, skipped, self.drops_space and not continues)


def make_detokenizer(
    backend: Backend, skipped: frozenset[int], before: Sequence[int] = ()
) -> Detokenizer:
    """A detokenizer for `backend`'s decoder that leaves out the tokens `skipped`.

    `before` are tokens whose text stands in front: where a decoder drops the space that begins a
    text, it is kept in one that continues.
    """
    kinds = _decoder_kinds(backend)
    if kinds == ["ByteLevel"]:
        return _ByteStream(lambda token_id: _spelled_bytes(backend, token_id), skipped)
    return _WindowStream(backend, skipped, before, "ByteLevel" in kinds)


def _decoder_kinds(backend: Backend) -> list[str]:
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    parts = state["decoders"] if state["type"] == "Sequence" else [state]
    return [part["type"] for part in parts]


class _ByteStream:
    """For vocabularies where each token is some bytes whatever stands around it."""

    def __init__(
        self,
        bytes_of: Callable[[int], bytes],
        skipped: frozenset[int],
        drops_space: bool = False,
    ) -> None:
        self._bytes_of, self._skipped, self._drops_space = bytes_of, skipped, drops_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        piece = b"" if token_id in self._skipped else self._bytes_of(token_id)
        if piece and self._drops_space:
            piece = piece.removeprefix(b" ")
            self._drops_space = False
        return self._utf8.decode(piece)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


def _spelled_bytes(backend: Backend, token_id: int) -> bytes:
    token = backend.id_to_token(token_id)
    if token is None:
        return b""
    try:
        return bytes(_BYTE_OF[char] for char in token)
    except KeyError:  # an added token that is plain text
        return token.encode()


class _WindowStream:
    """For other decoders: decodes new tokens behind the last one emitted and takes what is added.

    Tokens that are single bytes are held until the run of them ends, as decoders judge a run as a
    whole.
    """

    _BYTE = re.compile(r"<0x[0-9A-F]{2}>")

    def __init__(
        self,
        backend: Backend,
        skipped: frozenset[int],
        before: Sequence[int],
        holds_partial: bool,
    ) -> None:
        self._backend, self._skipped, self._holds_partial = backend, skipped, holds_partial
        self._context = [item for item in before[-4:] if self._token(item) is not None][-1:]
        self._pending: list[int] = []

    def add(self, token_id: int) -> str:
        token = self._token(token_id)
        if token is None:
            return ""
        self._pending.append(token_id)
        return "" if self._BYTE.fullmatch(token) else self._take()

    def _token(self, token_id: int) -> str | None:
        return None if token_id in self._skipped else self._backend.id_to_token(token_id)

    def finish(self) -> str:
        self._holds_partial = False
        return self._take() if self._pending else ""

    def _take(self) -> str:
        before = self._decode(self._context)
        text = self._decode(self._context + self._pending)[len(before) :]
        if self._holds_partial and text.endswith("\ufffd") and len(self._pending) < 4:
            return ""
        self._context, self._pending = self._pending[-1:], []
        return text

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=False)


def bytes_of_letters() -> dict[str, int]:
    """The characters by which byte-level vocabularies spell bytes.

    Printable Latin-1 characters stand for themselves; other bytes take characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {chr(byte): byte for byte in printable}
    return spelled | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = bytes_of_letters()
