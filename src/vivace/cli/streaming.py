"""An answer on its way to the terminal: written as it comes, stopped by Ctrl-C, timed."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from threading import Event
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vivace.engine.request import FinishReason
    from vivace.llm import LLM, Timing
    from vivace.types import SamplingParams

__all__ = ["Streamed", "describe", "stream", "why_cut"]


def describe(timing: Timing) -> str:
    """Timing in a line."""
    return (
        f"{timing.num_prompt_tokens} prompt tokens at {timing.prefill_tokens_per_second:.0f}/s, "
        f"{timing.num_tokens} tokens at {timing.decode_tokens_per_second:.1f}/s, "
        f"first after {timing.prefill_seconds:.3f} s"
    )


def why_cut(llm: LLM, finish_reason: FinishReason | None, num_tokens: int) -> str | None:
    """A line that says why an answer ended early, if it did; `num_tokens` with its prompt."""
    if finish_reason != "length":
        return None
    if num_tokens >= llm.max_context:
        return f"[the context is full: all {llm.max_context} tokens are used]"
    return "[stopped at max_tokens: a higher one allows more]"


@dataclass(slots=True)
class Streamed:
    """What a stream gave, to its end or to Ctrl-C."""

    text: str = ""
    num_tokens: int = 0
    timing: Timing | None = None  # None if interrupted
    finish_reason: FinishReason | None = None  # None if interrupted
    cut: str | None = None  # for the reader: what ended the answer early
    is_interrupted: bool = False


def stream(llm: LLM, params: SamplingParams, write: Callable[[str], Any], **given: Any) -> Streamed:
    """Write an answer as it comes. Ctrl-C ends the answer, not the program."""
    done = Streamed()
    with (
        _noticing_interrupts() as interrupted,
        closing(llm.stream(params=params, **given)) as deltas,
    ):
        for delta in deltas:
            write(delta.text)
            sys.stdout.flush()
            done.text += delta.text
            done.num_tokens += len(delta.token_ids)
            done.timing, done.finish_reason = delta.timing, delta.finish_reason
            if interrupted.is_set():
                done.is_interrupted = True
                break
    if done.timing is not None:
        num_tokens = done.timing.num_prompt_tokens + done.num_tokens
        done.cut = why_cut(llm, done.finish_reason, num_tokens)
    return done


@contextmanager
def _noticing_interrupts() -> Iterator[Event]:
    """Let the first Ctrl-C only set an event, so that no step of the engine is torn in the middle.

    A second one interrupts at once.
    """
    interrupted = Event()

    def notice(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    before = signal.signal(signal.SIGINT, notice)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
