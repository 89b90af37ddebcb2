"""What a request becomes for its caller: a completion, deltas, and where the time went."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from vivace.engine.request import Event, FinishReason, Request, TokenLogprob

__all__ = ["Choice", "Collector", "Completion", "Delta", "Timing"]


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of a request went; prefill includes the wait for admission."""

    num_prompt_tokens: int
    num_tokens: int  # generated, over all choices
    prefill_seconds: float  # arrival to first token
    decode_seconds: float  # first token to the end

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.num_prompt_tokens / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first, over the time they took; 0 if there are none."""
        return (self.num_tokens - 1) / self.decode_seconds if self.num_tokens > 1 else 0.0


@dataclass(slots=True)
class Choice:
    """One of the `n` answers to a prompt."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Completion:
    """The answer to a prompt; `text` and its neighbours are those of the first choice."""

    prompt_token_ids: list[int]
    choices: list[Choice]
    prompt_logprobs: list[TokenLogprob] | None = None  # from the second prompt token on
    timing: Timing = Timing(0, 0, 0.0, 0.0)

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        return self.choices[0].logprobs

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.choices[0].finish_reason


@dataclass(frozen=True, slots=True)
class Delta:
    """What a step added to choice `index`; the last one of a choice says why it ended."""

    text: str
    token_ids: tuple[int, ...]
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    timing: Timing | None = None  # with the last delta of all


class Collector:
    """Gathers a request's events, in whichever thread steps the engine."""

    def __init__(self, request: Request) -> None:
        params = request.params
        self.request_id: int | None = None  # once it is queued
        self.is_done = False
        self.last: Event | None = None
        self._num_prompt_tokens = request.num_rows
        logprobs = params.logprobs is not None
        self._choices = [Choice(logprobs=[] if logprobs else None) for _ in range(params.n)]
        self._prompt_logprobs: list[TokenLogprob] | None = None
        self._deltas: deque[Delta] = deque()
        self._error: Exception | None = None

    def listen(self, event: Event) -> None:
        choice = self._choices[event.index]
        choice.text += event.text
        choice.token_ids += event.token_ids
        if choice.logprobs is not None:
            choice.logprobs += event.logprobs
        choice.finish_reason = event.finish_reason
        if event.prompt_logprobs is not None:
            self._prompt_logprobs = event.prompt_logprobs
        self._error = self._error or event.error
        if event.is_last:
            self.last = event
        if event.error is None and (event.text or event.token_ids or event.finish_reason):
            self._deltas.append(
                Delta(
                    event.text,
                    tuple(event.token_ids),
                    event.index,
                    tuple(event.logprobs),
                    event.finish_reason,
                    self._timing() if event.is_last else None,
                )
            )
        self.is_done = event.is_last

    def take_deltas(self) -> Iterator[Delta]:
        while self._deltas:
            yield self._deltas.popleft()
        self.check()

    def check(self) -> None:
        """Raise what ended the request, if that was an error."""
        if self._error is not None:
            raise self._error

    def completion(self, prompt_token_ids: list[int]) -> Completion:
        self.check()
        return Completion(prompt_token_ids, self._choices, self._prompt_logprobs, self._timing())

    def _timing(self) -> Timing:
        assert self.last is not None
        timing = self.last.timing
        assert timing is not None
        assert timing.finished is not None
        first = timing.finished if timing.first_token is None else timing.first_token
        return Timing(
            self._num_prompt_tokens,
            sum(len(choice.token_ids) for choice in self._choices),
            first - timing.arrived,
            timing.finished - first,
        )
