"""Gemma 3 with a vision tower: its text model alone, which takes no images."""

from dataclasses import replace

from vivace.blocks import ModelGraph
from vivace.models.config import Config
from vivace.models.families import graph_from_config

ARCHITECTURES = ("Gemma3ForConditionalGeneration",)
NAME_PREFIX = "language_model."
# What the published text configs leave out.
_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def graph(config: Config) -> ModelGraph:
    text = config.required_section("text_config")
    fields = _DEFAULTS | dict(text.values) | {"model_type": "gemma3_text"}
    return replace(graph_from_config(Config(fields, text.source)), family="gemma3")
