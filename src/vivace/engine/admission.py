"""Which requests are refused, and why, before anything is allocated for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vivace.engine.request import Request
from vivace.errors import InvalidRequest, OutOfBlocks, PromptTooLong
from vivace.types import Executor, InputKind, InputSegment, RequestKind

if TYPE_CHECKING:
    from vivace.engine.engine import Engine

__all__ = ["blocks_that_fit", "check_input", "check_request", "max_new_tokens"]


def blocks_that_fit(
    executor: Executor, block_size: int, max_context: int, cache_bytes: int | None
) -> int:
    """Blocks per layer group: as many as `cache_bytes` hold, or two whole contexts."""
    if cache_bytes is None:
        return 2 * -(-max_context // block_size)
    groups = range(len(executor.graph.groups))
    num_blocks = cache_bytes // sum(executor.bytes_per_block(g, block_size) for g in groups)
    if num_blocks < 1:
        raise OutOfBlocks(
            f"{cache_bytes} bytes of cache hold no block of {block_size} tokens: raise them"
        )
    return num_blocks


def check_request(engine: Engine, request: Request, num_tokens: int) -> None:
    """Raises `InvalidRequest`, `PromptTooLong` or `OutOfBlocks`."""
    params, generates = request.params, request.kind is RequestKind.GENERATE
    for name in ("priority", "first_scored", "hidden_block"):
        value = getattr(request, name)
        if type(value) is not int and not (name == "hidden_block" and value is None):
            raise InvalidRequest(f"{name} is {value!r}: expected a whole number")
    if request.adapter_id != 0:
        raise InvalidRequest(f"adapter_id is {request.adapter_id!r}: expected 0, none is loaded")
    if num_tokens == 0:
        raise InvalidRequest("the prompt is empty: give at least one token")
    limit = engine.max_context - generates
    if num_tokens > limit:
        raise PromptTooLong(num_tokens, engine.max_context)
    if params.n > engine.limits.max_streams:
        raise InvalidRequest(
            f"n is {params.n}: expected at most {engine.limits.max_streams}, "
            "the number of streams that run at a time"
        )
    if params.n > 1 and not generates:
        raise InvalidRequest(f"n is {params.n}: expected 1 for a request of kind {request.kind}")
    if params.stop and engine.detokenizer is None:
        raise InvalidRequest("stop strings need a tokenizer: use stop_token_ids")
    vocab_size = engine.graph.vocab_size
    params.check_vocabulary(vocab_size)
    if max(params.logprobs or 0, params.prompt_logprobs or 0) > vocab_size:
        raise InvalidRequest(f"more alternatives than tokens: expected at most {vocab_size}")
    for segment in request.inputs:
        check_input(engine, segment)
    if request.kind is RequestKind.SCORE and not 1 <= request.first_scored < num_tokens:
        raise InvalidRequest(
            f"first_scored is {request.first_scored}: expected 1 to {num_tokens - 1}, the index "
            "of a token that has another before it"
        )
    num_blocks = len(engine.graph.blocks)
    if request.hidden_block is not None and not 0 <= request.hidden_block <= num_blocks:
        raise InvalidRequest(f"hidden_block is {request.hidden_block}: expected 0 to {num_blocks}")
    longest = num_tokens
    if generates:  # the last token that is generated never enters the cache
        longest += max(1, max_new_tokens(engine, request, num_tokens)) - 1
    capacity = engine.pool.capacity_tokens
    if longest > capacity:
        raise OutOfBlocks(
            f"the request needs {longest} tokens of cache but there are {capacity}: shorten the "
            "prompt, lower max_tokens, or give the cache more memory"
        )


def check_input(engine: Engine, segment: InputSegment) -> None:
    """Raises `InvalidRequest` if the model cannot read a segment."""
    data, graph = segment.data, engine.graph
    match segment.kind:
        case InputKind.TOKENS:
            if data.ndim != 1 or data.dtype.kind not in "iu":
                raise InvalidRequest(f"the tokens are {data!r}: expected a row of whole token ids")
            if len(data) and not (data.min() >= 0 and data.max() < graph.vocab_size):
                wrong = next(int(t) for t in data if not 0 <= t < graph.vocab_size)
                raise InvalidRequest(
                    f"token id {wrong} is not in the vocabulary: expected 0 to "
                    f"{graph.vocab_size - 1}"
                )
        case InputKind.EMBEDDINGS:
            if data.ndim != 2 or data.shape[1] != graph.hidden_size:
                raise InvalidRequest(
                    f"input embeddings of shape {data.shape}: expected [rows, {graph.hidden_size}]"
                )
        case InputKind.FEATURES:
            raise InvalidRequest("this model reads no encoder features: give tokens or embeddings")


def max_new_tokens(engine: Engine, request: Request, num_tokens: int) -> int:
    """How many tokens to generate at most; without max_tokens, what context and cache hold."""
    room = engine.max_context - num_tokens
    if request.params.max_tokens is not None:
        return min(room, request.params.max_tokens)
    return min(room, engine.pool.capacity_tokens + 1 - num_tokens)
