"""`vivace run`: one answer, an answer to what is piped in, or a chat."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

import click

from vivace.cli.options import MODEL, SAMPLING, command
from vivace.cli.output import INTERRUPTED, note, print_json
from vivace.config import Settings
from vivace.errors import InvalidRequest, TemplateError

if TYPE_CHECKING:
    from vivace.llm import LLM
    from vivace.types import SamplingParams

__all__ = ["run"]


def _run(settings: Settings, model: str | None, prompt: str | None) -> None:
    """Answer a prompt, or chat.

    MODEL is a directory, a GGUF file, org/name on the hub (org/name:Q4_K_M for one of its GGUF
    files), or a shipped name. A single argument that is none of these is the prompt. Text piped in
    is the prompt, too, after PROMPT if both are given. With neither it is a chat. Where a
    checkpoint recommends sampling settings, they are the defaults.
    """
    from vivace.cli import models

    if model is not None and prompt is None and not models.names_model(model):
        models.check_no_typo(model)
        model, prompt = None, model
    model = model or str(settings["model"])
    if settings["estimate"]:
        models.print_estimate(model, settings)
        return
    models.check_sampling(settings)
    if settings["json"] is False and settings.given(("logprobs", "prompt_logprobs")):
        raise InvalidRequest("logprobs needs --json: the plain output has no place for it")
    prompt = _with_piped(prompt)
    if prompt is None and (settings["json"] or settings["raw"]):
        raise InvalidRequest("--json and --raw need a prompt: give one, or pipe it in")
    if settings["raw"] and settings["system"]:
        raise InvalidRequest("--raw has no place for a system message: write it into the prompt")
    with models.load(model, settings) as llm:
        if not settings["raw"] and not llm.tokenizer.has_template:
            raise TemplateError(f"{model} has no chat template: --raw continues a plain prompt")
        if prompt is not None:
            _answer(llm, prompt, settings)
        else:
            from vivace.cli.chat import Chat

            Chat(llm, settings).talk()


def _with_piped(prompt: str | None) -> str | None:
    """The prompt, then what is piped into stdin; None if there is a terminal to talk to."""
    if sys.stdin is None or sys.stdin.isatty():
        return prompt
    try:
        piped = sys.stdin.buffer.read().decode("utf-8").strip("\n")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"stdin is not UTF-8 text: {error}") from error
    parts = [part for part in (prompt, piped) if part]
    if not parts:
        raise InvalidRequest("no prompt: give one as an argument, or pipe one in")
    return "\n\n".join(parts)


def _answer(llm: LLM, prompt: str, settings: Settings) -> None:
    from vivace.cli.models import sampling_params
    from vivace.cli.streaming import describe, stream

    params = sampling_params(llm, settings.given(SAMPLING))
    if settings["raw"]:
        given: dict[str, Any] = {"prompt": prompt}
    else:
        system = [{"role": "system", "content": settings["system"]}] if settings["system"] else []
        given = {"messages": [*system, {"role": "user", "content": prompt}]}
    if settings["json"] or params.n > 1:
        _print_whole(llm, given, params, settings["json"])
        return
    done = stream(llm, params, sys.stdout.write, **given)
    print()
    if done.cut is not None:
        note(done.cut)
    if settings["verbose"] and done.timing is not None:
        note(describe(done.timing))
    if done.is_interrupted:
        raise click.exceptions.Exit(INTERRUPTED)


def _print_whole(llm: LLM, given: dict[str, Any], params: SamplingParams, as_json: bool) -> None:
    from vivace.cli.streaming import why_cut

    if "prompt" in given:
        done = llm.generate(given["prompt"], params)
    else:
        done = llm.chat(given["messages"], params)
    if as_json:
        print_json(dataclasses.asdict(done))
        return
    for number, choice in enumerate(done.choices, 1):
        print(f"[{number}]\n{choice.text}", flush=True)
        num_tokens = len(done.prompt_token_ids) + len(choice.token_ids)
        if (cut := why_cut(llm, choice.finish_reason, num_tokens)) is not None:
            note(cut)


run = command(
    "run",
    _run,
    *MODEL,
    *("system", "raw", "at_full_context", "estimate", "verbose", "json"),
    *SAMPLING,
    parameters=(
        click.Argument(["model"], required=False),
        click.Argument(["prompt"], required=False),
    ),
)
