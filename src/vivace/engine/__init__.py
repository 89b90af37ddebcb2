"""Requests in, tokens out: scheduling, cache blocks and the steps between them."""

from vivace.engine.engine import Engine
from vivace.engine.request import Event, FinishReason, Request, Timing, TokenLogprob
from vivace.engine.scheduler import Limits, Stats

__all__ = [
    "Engine",
    "Event",
    "FinishReason",
    "Limits",
    "Request",
    "Stats",
    "Timing",
    "TokenLogprob",
]
