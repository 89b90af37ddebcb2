"""From a checkpoint to a graph: families, files, tokenizers, templates."""

from vivace.models.families import families, graph_from_config, name_prefix

__all__ = ["families", "graph_from_config", "name_prefix"]
