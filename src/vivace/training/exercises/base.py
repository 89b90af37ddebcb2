"""What an exercise is made of, and the words that all of them draw from."""

from __future__ import annotations

from dataclasses import dataclass

_WORDS = """amber anchor apple arrow autumn badge bamboo basket beacon bird boat book bottle branch
    brass bread brick bridge brush bucket button cabin cactus candle canyon carpet castle cedar
    chain chair cherry circle cliff clock cloud clover coffee comet copper coral cotton cradle
    crystal curtain daisy desert diamond dragon drum eagle earth echo ember engine fabric falcon
    feather fern fiddle field flame flute forest fossil fountain fox garden ginger glacier glass
    globe gold granite grape harbor harvest hawk hazel helmet honey horse iceberg indigo iron
    island ivory jacket jasmine jewel jungle kettle key kite ladder lake lamp lantern leaf lemon
    lily lion lizard lotus magnet mango maple marble meadow mirror moon moss mountain needle nest
    night north oak ocean olive onion opal orange orchid otter owl paddle palace panda paper
    pebble pencil pepper piano pine planet plum pocket pond prism puzzle quartz quiet quill
    rabbit rain raven ribbon river robin rocket rose ruby saddle sail salt sand shadow shell
    silver smoke snow spark spider spring star stone storm summer sun table temple thunder tiger
    timber tower train tulip tunnel turtle umbrella valley velvet violet violin wagon walnut
    water wheat whale wheel willow wind window winter wolf yarn yellow zebra zenith"""
WORDS = tuple(_WORDS.split())


@dataclass(frozen=True, slots=True)
class Turn:
    role: str  # "system", "user" or "assistant"
    text: str


@dataclass(frozen=True, slots=True)
class Exercise:
    """A conversation; every assistant turn is the one right answer to what stands before it."""

    kind: str
    difficulty: int
    turns: tuple[Turn, ...]
