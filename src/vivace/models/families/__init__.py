"""Model families by file name: a file's stem is the `model_type` that it reads, dashes as `_`."""

from __future__ import annotations

import importlib
import pkgutil
import types

from vivace.blocks import ModelGraph
from vivace.errors import UnsupportedModel
from vivace.models.config import Config

__all__ = ["families", "graph_from_config", "name_prefix"]

# Fields that change what a model computes, with the values at which they change nothing: refused
# where the family has not read them.
_NEUTRAL = {
    "pretraining_tp": (None, 1),
    "quantization_config": (None,),
    "compression_config": (None,),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "attention_sinks": (None, False),
    "clip_qkv": (None,),
    "use_bidirectional_attention": (None, False),
    "sparse_config": (None,),
    "block_configs": (None,),
    "per_layer_config": (None,),
}


def families() -> list[str]:
    """Every model type there is, sorted; imports none."""
    names = (item.name for item in pkgutil.iter_modules(__path__))
    return sorted(name for name in names if not name.startswith("_"))


def graph_from_config(config: Config) -> ModelGraph:
    """The block list of a checkpoint.

    Raises `UnsupportedModel` for an unknown family or a field that is not supported, `BadFile` for
    a wrong value.
    """
    family = _family(config)
    graph = _module(family).graph(config)
    for name, neutral in _NEUTRAL.items():
        if name not in config.names_read and config.values.get(name) not in neutral:
            if name == "quantization_config":
                advice = "use the unquantized checkpoint"
            else:
                advice = "use a checkpoint without it"
            raise UnsupportedModel(
                f"{config.source}: field '{name}' is not supported by '{family}': {advice}"
            )
    return graph


def name_prefix(family: str) -> str:
    """What may stand before the tensor names of a family's checkpoints; often nothing."""
    return getattr(_module(family), "NAME_PREFIX", "")


def _module(family: str) -> types.ModuleType:
    return importlib.import_module(f"{__name__}.{family}")


def _family(config: Config) -> str:
    known = families()
    name = config.text("model_type", None)
    if name is None:
        architectures = config.values.get("architectures")
        named = architectures if isinstance(architectures, list) else []
        found = [f for f in known if any(name in named for name in _module(f).ARCHITECTURES)]
        if not found:
            raise UnsupportedModel(
                f"{config.source}: names no model_type: expected one of {', '.join(known)}"
            )
        return found[0]
    if name.replace("-", "_") in known:
        return name.replace("-", "_")
    needs_code = " (it would run the checkpoint's own code)" if config.has("auto_map") else ""
    raise UnsupportedModel(
        f"{config.source}: model_type '{name}' is not supported{needs_code}: "
        f"expected one of {', '.join(known)}"
    )
