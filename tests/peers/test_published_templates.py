"""Published chat templates render as transformers renders them, over many conversations."""

from __future__ import annotations

from typing import Any

import pytest
from peer import LLAMA_CPP
from transformers.utils.chat_template_utils import render_jinja_template

from vivace.errors import TemplateError
from vivace.models.templates import ChatTemplate

SOURCES = {
    path.stem: path.read_text("utf-8")
    for path in sorted((LLAMA_CPP / "models" / "templates").glob("*.jinja"))
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(name: str, arguments: Any, call_id: str = "call00001") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(name: str, content: str, call_id: str = "call00001") -> dict[str, Any]:
    return said("tool", content, name=name, tool_call_id=call_id)


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [said("user", "hi")],
    "system": [said("system", "Be brief."), said("user", " Is 1 < 2 & 'é' 東京? \n")],
    "turns": [
        said("system", "Be brief."),
        said("user", "1"),
        said("assistant", "one"),
        said("user", "2"),
        said("assistant", "two\n"),
        said("user", "3"),
    ],
    "ends with an answer": [said("user", "1"), said("assistant", "one")],
    "thought in the text": [
        said("user", "1"),
        said("assistant", "<think>\nhm\n</think>\n\none"),
        said("user", "2"),
    ],
    "reasoning": [
        said("user", "1"),
        said("assistant", "one", reasoning_content="hm, 1"),
        said("user", "2"),
        said("assistant", "two", reasoning_content="hm, 2"),
    ],
    "reasoning by another name": [said("user", "1"), said("assistant", "one", reasoning="hm")],
    "call": [
        said("system", "s"),
        said("user", "weather?"),
        said("assistant", "", tool_calls=[call("get_weather", {"city": "Paris", "days": 2})]),
        result("get_weather", "sunny"),
    ],
    "call without content": [
        said("user", "weather?"),
        said("assistant", None, tool_calls=[call("get_weather", {"city": "Zürich"})]),
        result("get_weather", '{"t": 1}'),
        said("assistant", "It is 1."),
        said("user", "thanks"),
    ],
    "call with arguments as text": [
        said("user", "weather?"),
        said("assistant", "", tool_calls=[call("get_weather", '{"city": "Paris"}')]),
        result("get_weather", "sunny"),
    ],
    "two calls and a thought": [
        said("user", "both"),
        said(
            "assistant",
            "ok",
            reasoning_content="two calls",
            tool_calls=[
                call("add", {"a": 1, "b": None}),
                call("get_weather", {"city": "x"}, "call00002"),
            ],
        ),
        result("add", "2"),
        result("get_weather", "rain", "call00002"),
    ],
    "parts": [said("user", parts("a", "b"))],
    "parts of others": [
        said("system", parts("sys", "tem")),
        said("user", parts("a")),
        said("assistant", parts("b", "c")),
        said("user", "d"),
    ],
}


def tool(name: str, description: str, properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": [*properties][:1]}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


SIMPLE_TOOLS = [
    tool("add", "Adds.", {"a": {"type": "number", "description": "the first"}}),
    tool("get_weather", "Weather.", {"city": {"type": "string", "description": "its name"}}),
]
RICH_TOOLS = [
    tool("get_weather", "Weather of a city.", {"city": {"type": "string"}, "days": {"enum": [1]}}),
    tool("add", "Adds <a> & 'b'.", {"b": {"type": ["number", "null"]}, "a": {"type": "array"}}),
]
TOOLS = (None, SIMPLE_TOOLS, RICH_TOOLS)
VARIABLES: list[dict[str, Any]] = [
    {},
    {"enable_thinking": True},
    {"enable_thinking": False},
    {"thinking": True},
    {"thinking": False},
    {"reasoning_effort": "high"},
    {"functions": "[]", "datetime": "2026-11-27"},
]


def theirs(source: str, messages: list[dict[str, Any]], **given: Any) -> str | None:
    """What transformers renders; None where the template fails."""
    try:
        texts, _ = render_jinja_template([messages], chat_template=source, **TOKENS, **given)
    except Exception:  # as many kinds as templates can fail in
        return None
    return texts[0]


def as_read(source: str, messages: list[dict[str, Any]], **given: Any) -> list[dict[str, Any]]:
    """Messages whose parts are one text for roles of which the template reads no parts."""
    read = []
    for message in messages:
        if isinstance(message["content"], list) and not _reads_parts(
            source, message["role"], given
        ):
            text = "\n".join(part["text"] for part in message["content"])
            message = message | {"content": text}
        read.append(message)
    return read


def _reads_parts(source: str, role: str, given: dict[str, Any]) -> bool:
    before = [said("user", "x")] if role == "assistant" else []
    after = [] if role == "user" else [said("user", "x")]
    plain, in_parts = (
        theirs(source, [*before, said(role, content), *after], **given)
        for content in ("a", parts("a"))
    )
    return plain == in_parts is not None


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", SOURCES)
def test_renders_as_transformers(name: str, conversation: str) -> None:
    source, messages = SOURCES[name], CONVERSATIONS[conversation]
    template = ChatTemplate(source)
    for tools in TOOLS:
        for add_prompt in (True, False):
            for variables in VARIABLES:
                given = {"tools": tools, "add_generation_prompt": add_prompt, **variables}
                expected = theirs(source, as_read(source, messages, **given), **given)
                if expected is not None:
                    ours = template.render(messages, tools, add_prompt, TOKENS | variables)
                    assert ours == expected
                else:
                    with pytest.raises(TemplateError):
                        template.render(messages, tools, add_prompt, TOKENS | variables)


def test_most_templates_render_most_conversations() -> None:
    """Refusals would agree for nothing."""
    rendered = {
        name: sum(
            any(
                theirs(source, item, tools=tools, **variables) is not None
                for tools in TOOLS
                for variables in (VARIABLES[0], VARIABLES[-1])
            )
            for item in CONVERSATIONS.values()
        )
        for name, source in SOURCES.items()
    }
    assert len(rendered) == 70
    assert min(rendered.values()) >= 4
    assert sum(rendered.values()) > 0.85 * len(CONVERSATIONS) * len(rendered)
