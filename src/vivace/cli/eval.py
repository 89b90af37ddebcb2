"""`vivace eval`: what a plan costs in quality, on a text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vivace.cli.models import load
from vivace.cli.options import MODEL, command
from vivace.cli.output import print_json
from vivace.config import Settings
from vivace.errors import BadFile, InvalidOption

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vivace.llm import LLM
    from vivace.measure.windows import Interval, Window

__all__ = ["evaluate"]


def _evaluate(
    settings: Settings,
    model: str | None,
    file: str | None,
    perplexity: str | None,
    kl: str | None,
) -> None:
    """Measure a model on a text.

    Give --perplexity FILE, or --kl OTHER_PLAN FILE: how far the predictions of OTHER_PLAN are from
    those of the plan that the other options choose.
    """
    if (perplexity is None) == (kl is None):
        raise InvalidOption(
            "eval measures one thing: give --perplexity FILE or --kl OTHER_PLAN FILE"
        )
    if perplexity is not None:
        if file is not None:
            raise InvalidOption(f"--perplexity already names its file: remove {file}")
        _perplexity(model or settings["model"], perplexity, settings)
        return
    if file is None:  # one argument: the model is the default one
        model, file = None, model
    if file is None:
        raise InvalidOption("--kl needs a text to compare on: vivace eval MODEL --kl PLAN FILE")
    assert kl is not None
    _divergence(model or settings["model"], kl, file, settings)


def _perplexity(model: str, file: str, settings: Settings) -> None:
    from vivace.measure.perplexity import perplexity

    text = _read(file)
    with load(model, settings) as llm:
        result = perplexity(llm.logits, _windows(llm, text, settings))
    if settings["json"]:
        print_json({"model": model, "file": file} | dataclasses.asdict(result))
        return
    print(f"perplexity  {result.perplexity:.4f}{_spell(result.interval)}")
    print(f"nats/token  {result.nll:.5f}")
    print(f"tokens      {result.num_tokens} in {result.num_windows} windows")


def _divergence(model: str, other_plan: str, file: str, settings: Settings) -> None:
    from vivace.measure.divergence import divergence

    text = _read(file)
    with (
        load(model, settings) as ours,
        load(model, settings, plan=other_plan) as theirs,
    ):
        result = divergence(ours.logits, theirs.logits, _windows(ours, text, settings))
    if settings["json"]:
        names = {"model": model, "file": file, "other_plan": other_plan}
        print_json(names | dataclasses.asdict(result))
        return
    print(f"KL mean     {result.mean:.3e}{_spell(result.interval, '.3e')} nats/token")
    print(f"KL p99      {result.p99:.3e}")
    print(f"KL max      {result.max:.3e}")
    print(f"same top-1  {result.top1_agreement:.4%}{_spell(result.top1_interval, '.4%')}")
    print(f"tokens      {result.num_tokens} in {result.num_windows} windows")


def _windows(llm: LLM, text: str, settings: Settings) -> Iterator[Window]:
    """The text in windows of the context, each begun as the tokenizer begins a text."""
    from vivace.measure.windows import windows

    before = llm.tokenizer.encode("")
    token_ids = llm.tokenizer.encode(text, add_special=False)
    return windows(token_ids, llm.max_context, settings["stride"], before[0] if before else None)


def _spell(interval: Interval | None, form: str = ".4f") -> str:
    return "" if interval is None else f"  95% [{interval.low:{form}}, {interval.high:{form}}]"


def _read(file: str) -> str:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise BadFile(f"{file}: {reason}: expected a readable text file") from error
    if not text.strip():
        raise BadFile(f"{file}: it is empty: expected a text to measure on")
    return text


evaluate = command(
    "eval",
    _evaluate,
    *MODEL,
    "stride",
    "json",
    parameters=(
        click.Argument(["model"], required=False),
        click.Argument(["file"], required=False),
        click.Option(["--perplexity"], metavar="FILE", help="perplexity of this text"),
        click.Option(["--kl"], metavar="OTHER_PLAN", help="KL divergence to this plan on FILE"),
    ),
)
