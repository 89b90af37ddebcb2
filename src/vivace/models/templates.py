"""Chat templates: found in all the places checkpoints keep them, rendered in a bounded sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace.errors import BadFile, InvalidRequest, TemplateError
from vivace.models.config import show
from vivace.models.formats.strict_json import read_bytes, read_object

if TYPE_CHECKING:
    import jinja2

__all__ = [
    "ChatTemplate",
    "Messages",
    "check_messages",
    "check_templates",
    "find_templates",
]

Messages = Sequence[Mapping[str, Any]]

MAX_TEMPLATE_BYTES = 2**20
MAX_MESSAGES = 10_000
MAX_DEPTH = 100
_REASONING = ("reasoning_content", "thinking", "reasoning")
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


def find_templates(path: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name; later places win: `tokenizer_config.json` (one, or a list of named ones),
    `chat_template.json`, `chat_template.jinja`, `additional_chat_templates/NAME.jinja`.

    Raises `BadFile`.
    """
    found = _from_config(tokenizer_config, f"{path}/tokenizer_config.json")
    file = path / "chat_template.json"
    if file.exists():
        found |= _from_config(read_object(file), str(file))
    file = path / "chat_template.jinja"
    if file.exists():
        found["default"] = _read(file)
    for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = _read(file)
    return check_templates(found, str(path))


def check_templates(templates: dict[str, str], source: str) -> dict[str, str]:
    """The same templates. Raises `BadFile` for one that is too long; `source` names the file."""
    for name, template in templates.items():
        if len(template) > MAX_TEMPLATE_BYTES:
            raise BadFile(f"{source}: chat template '{name}' is longer than {MAX_TEMPLATE_BYTES}")
    return templates


def _from_config(config: Mapping[str, Any], source: str) -> dict[str, str]:
    value = config.get("chat_template")
    if value is None:
        return {}
    items = [{"name": "default", "template": value}] if isinstance(value, str) else value
    if isinstance(items, Mapping):
        items = [{"name": name, "template": text} for name, text in items.items()]
    found = {}
    for item in items if isinstance(items, list) else [items]:
        name, text = (
            (item.get("name"), item.get("template")) if isinstance(item, Mapping) else (None, None)
        )
        if not isinstance(name, str) or not isinstance(text, str):
            raise BadFile(f"{source}: chat_template is {show(value)}: expected a string or a list")
        found[name] = text
    return found


def _read(file: Path) -> str:
    try:
        return read_bytes(file, MAX_TEMPLATE_BYTES).decode()
    except UnicodeDecodeError as error:
        raise BadFile(f"{file}: is not UTF-8: download it again") from error


class ChatTemplate:
    """A template, compiled on first use."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._parts_of: dict[str, bool] = {}  # by role

    @cached_property
    def _compiled(self) -> jinja2.Template:
        import jinja2

        from vivace.models.sandbox import compile_template

        try:
            return compile_template(self.source)
        except jinja2.TemplateError as error:
            raise TemplateError(
                f"the chat template is not valid ({_reason(error)}): use a plain prompt"
            ) from error
        except (RecursionError, MemoryError, SyntaxError, ValueError) as error:
            raise TemplateError(
                "the chat template is nested too deeply: repair it, or use a plain prompt"
            ) from error

    def render(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation.

        A content in parts stays so for a template that reads it; others get one text, the parts
        below one another.

        Raises `InvalidRequest` for malformed messages and `TemplateError` where the template fails,
        refuses the messages, or does too much.
        """
        checked = check_messages(messages)
        given = dict(variables or {}) | {
            "tools": _plain(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        for role in {message["role"] for message in checked if _has_parts(message)}:
            if not self._takes_parts(role, given):
                checked = [_in_one(message, role) for message in checked]
        return self._render(checked, given)

    def _takes_parts(self, role: str, given: Mapping[str, Any]) -> bool:
        """Whether a content in parts reads as the same text does for this role."""
        if role not in self._parts_of:
            user = {"role": "user", "content": "x"}
            before = [user] if role == "assistant" else []
            after = [] if role == "user" else [user]
            contents = ("text", [{"type": "text", "text": "text"}])
            probes = ([*before, {"role": role, "content": item}, *after] for item in contents)
            try:
                expected, found = (self._render(messages, given) for messages in probes)
            except TemplateError:
                expected, found = "", None
            self._parts_of[role] = found == expected
        return self._parts_of[role]

    def _render(self, messages: list[dict[str, Any]], given: Mapping[str, Any]) -> str:
        from vivace.models.sandbox import render

        try:
            return render(self._compiled, {**given, "messages": messages})
        except TemplateError:
            raise
        except Exception as error:  # a template's failures are of any kind
            raise TemplateError(
                f"the chat template refuses these messages ({_reason(error)}): "
                "change them, or use a plain prompt"
            ) from error


def _reason(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0][:200]
    return text or type(error).__name__


def check_messages(messages: Messages) -> list[dict[str, Any]]:
    """Messages as plain data.

    Reasoning has several names, of which templates read one or another: it is there under two.

    Raises `InvalidRequest`.
    """
    is_list = isinstance(messages, Sequence) and not isinstance(messages, str | bytes)
    if not is_list or not 0 < len(messages) <= MAX_MESSAGES:
        raise InvalidRequest(f"messages: expected a list of 1 to {MAX_MESSAGES} messages")
    return [_message(message) for message in messages]


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        known = ", ".join(ROLES)
        raise InvalidRequest(f"message {show(message)}: expected an object with a role of {known}")
    plain = _plain(message)
    content = plain.get("content")
    if isinstance(content, list):
        for part in content:
            is_text = isinstance(part, dict) and part.get("type") == "text"
            if not is_text or not isinstance(part.get("text"), str):
                raise InvalidRequest(f"message part {show(part)}: expected type text and a text")
    elif content is not None and not isinstance(content, str):
        raise InvalidRequest(f"message content {show(content)}: expected a string or text parts")
    reasoning = next((plain[key] for key in _REASONING if plain.get(key) is not None), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _has_parts(message: Mapping[str, Any]) -> bool:
    return isinstance(message.get("content"), list)


def _in_one(message: dict[str, Any], role: str) -> dict[str, Any]:
    if message["role"] != role or not _has_parts(message):
        return message
    return message | {"content": "\n".join(part["text"] for part in message["content"])}


def _plain(value: Any, depth: int = 0) -> Any:
    """JSON data as exact plain types, so that a template meets no other methods."""
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"messages or tools are nested deeper than {MAX_DEPTH}")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key, depth + 1): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    raise InvalidRequest(f"messages or tools hold {show(value)}: expected JSON data")
