"""Text that every machine with CPython has: the standard library's sources and documentation."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from random import Random

__all__ = ["Corpus", "Split", "read_corpus", "split_of"]

Split = str  # "train" or "heldout"

_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "_bundled",
}
_SKIPPED_PREFIXES = ("encodings/", "lib2to3/", "config-", "idlelib/idle_test")
_MAX_LINE_CHARACTERS = 120


def split_of(text: str, one_in: int) -> Split:
    """The split a piece of text belongs to, by hash: one in `one_in` is held out."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") % one_in == 0 else "train"


@dataclass(frozen=True)
class Corpus:
    """Documents (name, lines) of one split, in the order of their names."""

    documents: tuple[tuple[str, tuple[str, ...]], ...]
    line_totals: tuple[int, ...]  # lines up to and with each document

    def lines(self, random: Random, num_characters: int) -> list[str]:
        """Consecutive lines from a random place, at least `num_characters` long or to the end."""
        line = random.randrange(self.line_totals[-1])
        document = bisect_right(self.line_totals, line)
        lines = self.documents[document][1]
        start = line - (self.line_totals[document - 1] if document else 0)
        taken: list[str] = []
        size = 0
        while size < num_characters and start < len(lines):
            taken.append(lines[start])
            size += len(lines[start]) + 1
            start += 1
        return taken

    def digest(self) -> str:
        """SHA-256 of names and texts: which corpus a model was trained on."""
        digest = hashlib.sha256()
        for name, lines in self.documents:
            digest.update("\n".join((name, *lines)).encode())
        return digest.hexdigest()


@cache
def read_corpus(split: Split) -> Corpus:
    """The corpus of this Python: sources, docstrings and the topics of `help()`."""
    root = Path(sysconfig.get_path("stdlib"))
    documents: list[tuple[str, tuple[str, ...]]] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if _SKIPPED_FOLDERS & set(path.parts[len(root.parts) :]):
            continue
        if name.startswith(_SKIPPED_PREFIXES) or split_of(name, 20) != split:
            continue
        try:
            text = path.read_text(encoding="ascii")
        except UnicodeDecodeError:
            continue
        if name == "pydoc_data/topics.py":
            continue
        documents.append((name, _clean(text)))
        documents.append((f"{name}:doc", _clean("\n\n".join(_docstrings(text)))))
    documents += [(n, _clean(t)) for n, t in _topics() if split_of(n, 20) == split]
    kept = tuple((name, lines) for name, lines in documents if len(lines) > 4)
    return Corpus(kept, tuple(accumulate(len(lines) for _, lines in kept)))


def _topics() -> list[tuple[str, str]]:
    from pydoc_data.topics import topics  # type: ignore[import-not-found]

    return [(f"topic:{name}", text) for name, text in sorted(topics.items())]


def _docstrings(text: str) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    return [doc for node in nodes if (doc := ast.get_docstring(node)) and len(doc) > 60]


def _clean(text: str) -> tuple[str, ...]:
    lines = [line.rstrip() for line in text.expandtabs().splitlines()]
    return tuple(line for line in lines if len(line) <= _MAX_LINE_CHARACTERS and line.isascii())
