"""Every error a user can cause, in one tree.

VivaceError                     exit code 1
├─ UserError                    exit code 2: the input is wrong; the message says what to do
│  ├─ ModelError                a model cannot be loaded
│  │  ├─ BadFile                a file is damaged, or not what its name says
│  │  ├─ UnsupportedModel       an architecture, field or quantization that is not known
│  │  └─ ModelNotFound          no such directory, file, hub name or shipped model
│  ├─ UnknownTechnique          no technique of that name in the seam
│  ├─ UnknownOption             a technique or setting has no such option
│  ├─ InvalidOption             an option's value is of the wrong type or range
│  ├─ IncompatibleTechniques    two parts of a plan may not be combined
│  ├─ InvalidRequest            sampling parameters, prompts, messages
│  │  └─ PromptTooLong          more tokens than the context holds
│  └─ TemplateError             a chat template is missing, fails or is refused
├─ OutOfBlocks                  the cache cannot hold the request even alone
├─ QueueFull                    the engine holds as many requests as it may: try again later
├─ MissingDependency            an extra is not installed
└─ NativeError                  the native core refused a call or failed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BadFile",
    "IncompatibleTechniques",
    "InvalidOption",
    "InvalidRequest",
    "MissingDependency",
    "ModelError",
    "ModelNotFound",
    "NativeError",
    "OutOfBlocks",
    "PromptTooLong",
    "QueueFull",
    "TemplateError",
    "UnknownOption",
    "UnknownTechnique",
    "UnsupportedModel",
    "UserError",
    "VivaceError",
    "nearest",
]


class VivaceError(Exception):
    """The root of the tree; the message is one line and says what to do."""

    exit_code = 1


class UserError(VivaceError):
    exit_code = 2


class ModelError(UserError):
    pass


class BadFile(ModelError):
    pass


class UnsupportedModel(ModelError):
    pass


class ModelNotFound(ModelError):
    pass


class UnknownTechnique(UserError):
    pass


class UnknownOption(UserError):
    pass


class InvalidOption(UserError):
    pass


class IncompatibleTechniques(UserError):
    """Techniques `first` and `second` may not be combined, for `reason`."""

    def __init__(self, first: str, second: str, reason: str) -> None:
        super().__init__(f"{first} cannot be combined with {second}: {reason}")
        self.first, self.second, self.reason = first, second, reason


class InvalidRequest(UserError):
    pass


class PromptTooLong(InvalidRequest):
    def __init__(self, num_tokens: int, limit: int, is_estimate: bool = False) -> None:
        about = "about " if is_estimate else ""
        super().__init__(
            f"the prompt has {about}{num_tokens} tokens but the context holds {limit} including "
            "at least one new token: shorten the prompt or raise the context"
        )
        self.num_tokens, self.limit = num_tokens, limit


class TemplateError(UserError):
    pass


class OutOfBlocks(VivaceError):
    pass


class QueueFull(VivaceError):
    def __init__(self, num_requests: int, num_tokens: int) -> None:
        super().__init__(
            f"the engine already holds {num_requests} requests with {num_tokens} prompt tokens: "
            "try again when some have finished"
        )


class MissingDependency(VivaceError):
    pass


class NativeError(VivaceError):
    pass


_MOST_SHOWN = 24


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest known ones, else all of them, or the first many."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    shown = [*known[:_MOST_SHOWN], "..."] if len(known) > _MOST_SHOWN else known
    return "known: " + (", ".join(shown) or "none")
