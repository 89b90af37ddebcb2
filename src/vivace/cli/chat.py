"""A chat in the terminal: history, commands, and what happens when the context is full."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace.cli.models import sampling_params
from vivace.cli.output import note
from vivace.cli.streaming import describe, stream
from vivace.config import SAMPLING, SETTINGS, Settings
from vivace.errors import BadFile, InvalidRequest, UnknownOption, UserError, nearest

if TYPE_CHECKING:
    from vivace.llm import LLM
    from vivace.types import SamplingParams

__all__ = ["Chat", "read_message"]

_HELP = """\
/set [NAME VALUE]  show or change a sampling setting, as in /set temperature 0.7
/system [TEXT]     show or change the system message
/clear             forget the conversation
/save FILE         write the conversation to a JSON file
/load FILE         go on with a saved conversation
/stats             tokens, context and speed so far
/bye               leave (so does Ctrl-D)
Ctrl-C stops an answer. A message of several lines stands between \"\"\" and \"\"\", or has a \\ at
the end of each line but the last."""

Message = dict[str, str]


def read_line(prompt: str) -> str:
    """A line from the terminal; the prompt stays out of a redirected stdout."""
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


def read_message(read: Callable[[str], str]) -> str:
    """One message: a line, lines joined by a trailing backslash, or what stands between \"\"\"s."""
    line = read(">>> ")
    if line.lstrip().startswith('"""'):
        lines = [line.lstrip()[3:]]
        while '"""' not in lines[-1]:
            lines.append(read("... "))
        lines[-1] = lines[-1].partition('"""')[0]
        return "\n".join(lines).strip("\n")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read("... "))
    return "\n".join(lines)


class Chat:
    """A conversation with one model; `read` and `write` are the terminal's unless given."""

    def __init__(
        self,
        llm: LLM,
        settings: Settings,
        read: Callable[[str], str] = read_line,
        write: Callable[[str], Any] = sys.stdout.write,
    ) -> None:
        self.llm = llm
        self.messages: list[Message] = []
        self._settings = settings
        self._params = _for_one_answer(sampling_params(llm, settings.given(SAMPLING)))
        self._read, self._write = read, write
        self._num_answers = self._num_answer_tokens = 0
        self._last_timing: Any = None
        self._commands = {
            "/help": self._help,
            "/set": self._set,
            "/system": self._system,
            "/clear": self._clear,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._stats,
            "/bye": self._bye,
        }
        if settings["system"]:
            self._system(settings["system"])

    def talk(self) -> None:
        """Read and answer until /bye or the end of input."""
        _enable_line_editing()
        note("/help lists the commands, /bye leaves.")
        while True:
            try:
                self._take(read_message(self._read))
            except EOFError:
                return
            except KeyboardInterrupt:
                note("\n/bye leaves.")
            except UserError as error:
                note(f"error: {error}")

    def _take(self, text: str) -> None:
        if text.startswith("/"):
            name, _, rest = text.partition(" ")
            if name not in self._commands:
                raise UnknownOption(f"no command {name}: {nearest(name, self._commands)}")
            self._commands[name](rest.strip())
        elif text.strip():
            self._answer(text)

    def _answer(self, text: str) -> None:
        messages = self._fit([*self.messages, {"role": "user", "content": text}])
        done = stream(self.llm, self._params, self._write, messages=messages)
        self._write("\n")
        if done.is_interrupted:
            note("[stopped]")
        if done.cut is not None:
            note(done.cut)
        self.messages = [*messages, {"role": "assistant", "content": done.text}]
        self._num_answers += 1
        self._num_answer_tokens += done.num_tokens
        if done.timing is not None:
            self._last_timing = done.timing
            if self._settings["verbose"]:
                note(describe(done.timing))

    # ------------------------------------------------------------ the context

    def _fit(self, messages: list[Message]) -> list[Message]:
        """The messages, without the oldest turns if they may go and the context asks for it.

        Raises `InvalidRequest` when the context is full and nothing may be dropped.
        """
        limit = self.llm.max_context
        if self._settings["at_full_context"] == "stop":
            count = self._count(messages)
            if count >= limit:
                raise InvalidRequest(
                    f"the context is full ({count} of {limit} tokens): /clear starts over; "
                    "with --at-full-context drop-oldest the oldest turns are forgotten instead"
                )
            return messages
        # An answer needs space, too.
        room = limit - min(self._params.max_tokens or limit, limit // 4)
        num_dropped = 0
        while (count := self._count(messages)) > room:
            kept = _without_oldest_turn(messages)
            if kept is None:
                raise InvalidRequest(
                    f"this message alone has {count} tokens, of a context of {limit}: shorten it"
                )
            messages, num_dropped = kept, num_dropped + 1
        if num_dropped:
            turns = "turn" if num_dropped == 1 else f"{num_dropped} turns"
            note(f"[the context is full: forgot the oldest {turns}]")
        return messages

    def _count(self, messages: list[Message]) -> int:
        return len(self.llm.tokenizer.encode_chat(messages))

    # ------------------------------------------------------------ commands

    def _help(self, _: str) -> None:
        note(_HELP)

    def _bye(self, _: str) -> None:
        raise EOFError

    def _clear(self, _: str) -> None:
        self.messages = [m for m in self.messages if m["role"] == "system"]
        note("forgot the conversation")

    def _set(self, rest: str) -> None:
        if not rest:
            for name in SAMPLING:
                note(f"{name} = {getattr(self._params, name)}")
            return
        name, _, raw = rest.partition(" ")
        if name not in SAMPLING:
            raise UnknownOption(f"no sampling setting '{name}': {nearest(name, SAMPLING)}")
        value = SETTINGS[name].parse(raw.strip(), "/set")
        self._params = _for_one_answer(dataclasses.replace(self._params, **{name: value}))
        note(f"{name} = {value}")

    def _system(self, text: str) -> None:
        if not text:
            note(
                next(
                    (m["content"] for m in self.messages if m["role"] == "system"),
                    "none",
                )
            )
            return
        others = [m for m in self.messages if m["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *others]

    def _save(self, rest: str) -> None:
        if not rest:
            raise InvalidRequest("/save needs a file name")
        data = {"messages": self.messages, "sampling": dataclasses.asdict(self._params)}
        try:
            Path(rest).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", "utf-8")
        except OSError as error:
            raise BadFile(
                f"{rest}: {error.strerror}: expected a file that can be written"
            ) from None
        note(f"saved {len(self.messages)} messages to {rest}")

    def _load(self, rest: str) -> None:
        if not rest:
            raise InvalidRequest("/load needs a file name")
        messages, sampling = _read_conversation(Path(rest))
        self._params = _for_one_answer(dataclasses.replace(self._params, **sampling))
        self.messages = messages
        note(f"loaded {len(self.messages)} messages from {rest}")

    def _stats(self, _: str) -> None:
        used = self._count(self.messages) if self.messages else 0
        note(f"context  {used} of {self.llm.max_context} tokens")
        note(f"answers  {self._num_answers}, {self._num_answer_tokens} tokens")
        if self._last_timing is not None:
            note(f"last     {describe(self._last_timing)}")


def _for_one_answer(params: SamplingParams) -> SamplingParams:
    if params.n != 1:
        raise InvalidRequest(f"n is {params.n}: expected 1, a chat has one answer at a time")
    return params


def _without_oldest_turn(messages: list[Message]) -> list[Message] | None:
    """Drop the first user message and what answers it; None if only the last one is left."""
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if len(users) < 2:
        return None
    return [*messages[: users[0]], *messages[users[1] :]]


def _read_conversation(path: Path) -> tuple[list[Message], dict[str, Any]]:
    try:
        data = json.loads(path.read_text("utf-8"))
        messages = [
            {"role": str(m["role"]), "content": str(m["content"])} for m in data["messages"]
        ]
        sampling = dict(data["sampling"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadFile(f"{path}: {error}: expected a conversation written by /save") from error
    for name in sampling:
        if name not in SAMPLING:
            raise UnknownOption(f"{path} has no setting '{name}': {nearest(name, SAMPLING)}")
    return messages, {
        name: SETTINGS[name].parse(value, str(path))
        for name, value in sampling.items()
        if value is not None
    }


def _enable_line_editing() -> None:
    """Arrow keys and a history of lines, where Python has them."""
    try:
        import readline  # noqa: F401  importing is what enables it
    except ImportError:
        note("line editing is not available: this Python has no readline")
