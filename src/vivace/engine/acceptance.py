"""What a forward gave each stream: drawn tokens, scored tokens, states."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vivace.engine.batch import Batch, Part, hidden_block
from vivace.engine.request import Event, Stream, TokenLogprob
from vivace.engine.sampling import Draw, Drawn, Sampler
from vivace.techniques.decoders.base import Decoder
from vivace.types import RandomKey, RequestKind, StepOutput

__all__ = ["Accepted", "accept", "add_result", "collect"]


@dataclass(slots=True)
class Accepted:
    """What a step gives one part, before any of it is made true."""

    num_kept: int  # rows whose cache writes stay
    choices: list[list[Drawn]]  # new tokens of the stream and of those that split off from it
    scored: list[TokenLogprob]
    scored_logits: np.ndarray  # [scored rows, vocab] float32
    states: np.ndarray | None  # [collected rows, hidden] float32


def accept(batch: Batch, output: StepOutput, decoder: Decoder, sampler: Sampler) -> list[Accepted]:
    """One result per part, in order; none where the forward was cancelled. Changes nothing."""
    if output.is_cancelled:
        return []
    drawn = _draw(batch.parts, output.logits, sampler)
    scored = _score(batch.parts, output.logits, sampler)
    num_taken = dict.fromkeys(output.hidden, 0)
    first_scored = len(output.logits) - sum(part.num_scored for part in batch.parts)
    accepted = []
    for part in batch.parts:
        stream, states = part.stream, None
        num_kept, choices = 0, []
        for _ in range(stream.seats if part.num_sampled else 1):
            choice = list(itertools.islice(drawn, part.num_sampled))
            tokens = [item.token_id for item in choice]
            num_kept, new = decoder.accept(stream.progress, part.rows, tokens)
            assert new == tokens[: len(new)], "a decoder keeps what was drawn, or less"
            choices.append(choice[: len(new)])
        if stream.collects_states and part.collected:
            block = hidden_block(stream, batch.num_blocks_of_model)
            first = num_taken[block]
            num_taken[block] += len(part.collected)
            states = output.hidden[block][first : num_taken[block]]
        lines = list(itertools.islice(scored, part.num_scored))
        logits = output.logits[first_scored : first_scored + part.num_scored]
        first_scored += part.num_scored
        accepted.append(Accepted(num_kept, choices, lines, logits, states))
    return accepted


def _draw(parts: list[Part], logits: np.ndarray, sampler: Sampler) -> Iterator[Drawn]:
    """Drawn tokens: by part, within it by choice, within it by sampled row."""
    draws: list[Draw] = []
    rows: list[int] = []
    num_rows = 0
    for part in parts:
        for choice in range(part.stream.seats if part.num_sampled else 0):
            draws += [_draw_of(part, choice, offset) for offset in part.rows.sampled]
            rows += range(num_rows, num_rows + part.num_sampled)
        num_rows += part.num_sampled
    if not draws:
        return iter(())
    return iter(sampler.draw(logits[:num_rows] if len(rows) == num_rows else logits[rows], draws))


def _draw_of(part: Part, choice: int, offset: int) -> Draw:
    stream, sequence = part.stream, part.stream.sequence
    params = stream.job.request.params
    position = part.rows.positions[offset] + 1  # of the token that is drawn
    key = RandomKey(sequence.seed, sequence.random_stream + choice, position)
    banned = stream.stop_ids if stream.num_generated < params.min_tokens else ()
    return Draw(params, key, *sequence.history(), tuple(sorted(banned)))


def _score(parts: list[Part], logits: np.ndarray, sampler: Sampler) -> Iterator[TokenLogprob]:
    """Log-probabilities of the tokens that follow the scored rows, by part and row."""
    token_ids: list[int] = []
    num_top: list[int] = []
    for part in parts:
        tokens = part.stream.sequence.token_ids
        params = part.stream.job.request.params
        for entry in part.collected[: part.num_scored]:
            token_ids.append(tokens[entry + 1])
            num_top.append(params.prompt_logprobs or 0)
    if not token_ids:
        return iter(())
    return iter(sampler.score(logits[len(logits) - len(token_ids) :], token_ids, num_top))


def collect(stream: Stream, part: Part, result: Accepted) -> None:
    """Add a part's rows to the request's result, in order of rows."""
    if not part.collected:
        return
    stream.num_collected = part.collected.stop
    stream.prompt_logprobs += result.scored
    if part.num_scored and stream.job.request.on_logits is not None:
        stream.job.request.on_logits(result.scored_logits)
    if result.states is None:
        return
    if stream.job.request.kind is RequestKind.HIDDEN:
        stream.states.append(np.array(result.states))
        return
    for state in result.states:  # one by one: chunks must not change the sum
        stream.state_sum = state.copy() if stream.state_sum is None else stream.state_sum + state


def add_result(stream: Stream, event: Event) -> None:
    """The result of a finished request that is not its text."""
    if stream.collects or stream.index:
        return  # it ended early, or is another choice of the same prompt
    if stream.collects_logprobs:
        event.prompt_logprobs = stream.prompt_logprobs
    elif stream.job.request.kind is RequestKind.HIDDEN:
        event.states = np.concatenate(stream.states)
    elif stream.state_sum is not None:
        event.states = stream.state_sum / np.float32(stream.num_prompt_tokens)
