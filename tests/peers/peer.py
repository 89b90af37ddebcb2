"""llama.cpp as `make peers` builds it: its files, and a process that answers questions."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["LLAMA_CPP", "PYTHON", "LlamaCpp", "has_peers"]

_ROOT = Path(os.environ.get("PEERS") or Path(__file__).parents[2] / ".venv-peers")
PYTHON = _ROOT / "venv" / "bin" / "python"
LLAMA_CPP = _ROOT / "source" / "vendor" / "llama.cpp"


def has_peers() -> bool:
    return PYTHON.exists() and LLAMA_CPP.is_dir()


class LlamaCpp:
    """One vocabulary opened by llama.cpp; `described` says what it found in it.

    Raises `ValueError` where it refuses the file.
    """

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [PYTHON, Path(__file__).with_name("llama_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        self.described: dict[str, Any] = self._ask(open=str(path))
        if "error" in self.described:
            self.close()
            raise ValueError(self.described["error"])

    def tokenize(self, texts: list[str], add_special: bool, parse_special: bool) -> list[list[int]]:
        return self._ask(tokenize=[[text, add_special, parse_special] for text in texts])

    def pieces(self, count: int) -> list[bytes]:
        """The bytes of the first `count` tokens, those of control tokens shown."""
        return [bytes.fromhex(shown) for shown, _ in self._ask(pieces=list(range(count)))]

    def close(self) -> None:
        self._process.communicate()

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "llama.cpp ended"
        return json.loads(answer)
