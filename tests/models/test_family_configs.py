"""What configs become: spellings, defaults, groups, names of tensors, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
from checkpoints import SIZES, checkpoint, sizes_of
from safetensors.numpy import load_file, save_file
from special_checkpoints import SPECIAL
from transformers import AutoConfig
from variants import (
    EXPERTS,
    GEMMA,
    KINDS,
    LOCAL_EXPERTS,
    MINICPM,
    PUZZLE,
    SHARED,
    SPELLINGS,
    VARIANTS,
    attention,
    ffn,
    puzzle,
    rope,
)

from vivace.blocks import AttentionBlock, LayerGroup, LinearBlock, MlpBlock, ModelGraph
from vivace.errors import BadFile, ModelError, UnsupportedModel
from vivace.models.config import Config
from vivace.models.families import _NEUTRAL, families, graph_from_config
from vivace.models.loading import load_model

# What a family needs beyond the sizes.
NEEDED: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": SIZES},
    "minicpm": MINICPM,
    "nemotron_nas": PUZZLE,
    "mixtral": LOCAL_EXPERTS,
    "qwen2_moe": SHARED,
    "qwen3_moe": EXPERTS,
    "olmoe": LOCAL_EXPERTS,
    "phimoe": {"num_local_experts": 6, "num_experts_per_tok": 2},
}


def fields_of(family: str) -> dict[str, Any]:
    return sizes_of(family) | NEEDED.get(family, {}) | {"model_type": family}


def graph_of(family: str, **changes: Any) -> ModelGraph:
    return graph_from_config(Config(fields_of(family) | changes))


@pytest.fixture(scope="module")
def saved_config(tmp_path_factory):
    """The config.json of a variant's checkpoint."""

    def get(variant: str) -> dict[str, Any]:
        path = tmp_path_factory.mktemp("checkpoint")
        checkpoint(variant, path)
        return json.loads((path / "config.json").read_text())

    return get


# ---------------------------------------------------------------- families


def test_families_are_the_files():
    assert families() == sorted({family for family, _ in VARIANTS.values()})
    for family in families():
        graph = graph_of(family)
        assert graph.family == family
        assert graph.num_layers == (5 if family == "nemotron_nas" else 3)


def test_a_family_is_found_by_architecture_too():
    named = SIZES | {"architectures": ["Qwen2ForCausalLM"]}
    assert graph_from_config(Config(named)).family == "qwen2"


@pytest.mark.parametrize("family", [f for f in families() if f not in SPECIAL])
def test_absent_fields_mean_what_they_mean_in_transformers(family):
    fields = fields_of(family)
    given = {name: value for name, value in fields.items() if name != "model_type"}
    explicit = AutoConfig.for_model(family, **given).to_dict()
    assert len(explicit) > len(fields) + 10
    assert graph_from_config(Config(fields)) == graph_from_config(Config(explicit))


def test_gemma3_means_what_published_configs_leave_out():
    """Those of the vision models give a text config that names only what differs."""
    text = {"hidden_size": 128, "num_hidden_layers": 8, "sliding_window": 9}
    explicit = AutoConfig.for_model("gemma3", text_config=text).to_dict()
    assert graph_of("gemma3", text_config=text) == graph_from_config(Config(explicit))


def test_old_and_new_spelling_of_ropes_give_one_graph(saved_config):
    for variant in ("llama, linear", "llama, dynamic", "llama, yarn", "llama, llama3"):
        new = saved_config(variant)
        old = copy.deepcopy(new)
        parameters = old.pop("rope_parameters")
        old["rope_theta"] = parameters.pop("rope_theta")
        old["rope_scaling"] = parameters
        oldest = copy.deepcopy(old)
        oldest["rope_scaling"]["type"] = oldest["rope_scaling"].pop("rope_type")
        graphs = [graph_from_config(Config(fields)) for fields in (new, old, oldest)]
        assert graphs[0] == graphs[1] == graphs[2]


@pytest.mark.parametrize(("variant", "change"), SPELLINGS, ids=lambda item: str(item)[:80])
def test_other_spellings_give_the_same_graph(variant, change, saved_config):
    fields = saved_config(variant)
    assert graph_from_config(Config(fields | change)) == graph_from_config(Config(fields))


@pytest.mark.parametrize("kind", ["yarn", "longrope"])
def test_a_missing_factor_follows_from_the_lengths(kind):
    parameters = {name: value for name, value in KINDS[kind][0].items() if name != "factor"}
    ropes = [
        graph_of("llama", max_position_embeddings=length, **more).ropes
        for length, more in (
            (128, rope(parameters)),
            (128, rope(parameters | {"factor": 4.0})),
            (256, rope(parameters)),
        )
    ]
    assert ropes[0] == ropes[1]
    assert ropes[0] != ropes[2]


# ---------------------------------------------------------------- groups, names, further heads


def test_windows_make_layer_groups():
    graph = graph_of("gemma2", **GEMMA)
    assert graph.groups == (LayerGroup(2, 2, 16, 9), LayerGroup(1, 2, 16, None))
    blocks = [block for block in graph.blocks if isinstance(block, AttentionBlock)]
    assert [(block.group, block.cache_layer) for block in blocks] == [(0, 0), (1, 0), (0, 1)]


def test_head_counts_make_layer_groups():
    graph = graph_of("nemotron_nas")
    assert graph.groups == (LayerGroup(2, 2, 16), LayerGroup(1, 1, 16))
    assert [(type(block).__name__, block.layer) for block in graph.blocks] == [
        ("AttentionBlock", 0),
        ("MlpBlock", 0),
        ("AttentionBlock", 1),
        ("MlpBlock", 2),
        ("LinearBlock", 3),
        ("LinearBlock", 3),
        ("AttentionBlock", 4),
        ("LinearBlock", 4),
    ]
    sizes = [block.down.in_features for block in graph.blocks if isinstance(block, MlpBlock)]
    assert sizes == [256, 512]
    names = [b.linear.parts[0].name for b in graph.blocks if isinstance(b, LinearBlock)]
    assert names[0] == "model.layers.3.self_attn.linear_attn.weight"


def test_gemma3_windows_have_the_local_rope():
    graph = graph_of("gemma3_text", **GEMMA, sliding_window_pattern=3, rope_local_base_freq=50.0)
    blocks = [block for block in graph.blocks if isinstance(block, AttentionBlock)]
    assert [block.rope for block in blocks] == [1, 1, 0]
    assert graph.ropes[1].inv_freq[1] == pytest.approx(50.0 ** (-1 / 8))
    assert graph.ropes[0].inv_freq[1] == pytest.approx(1e6 ** (-1 / 8))


def test_gemma3_is_its_text_model():
    text = {name: value for name, value in fields_of("gemma3_text").items() if name != "model_type"}
    wrapped = graph_of("gemma3", text_config=text | GEMMA)
    assert wrapped == dataclasses.replace(graph_of("gemma3_text", **GEMMA), family="gemma3")
    with pytest.raises(BadFile, match="'text_config' is missing"):
        graph_from_config(Config({"model_type": "gemma3"}))
    with pytest.raises(UnsupportedModel, match="text_config: field 'attn_logit_softcapping'"):
        graph_of("gemma3", text_config=text | {"attn_logit_softcapping": 50.0})


def test_further_heads_are_apart_from_the_model():
    graph = graph_of("mimo", num_nextn_predict_layers=2)
    assert dataclasses.replace(graph, next_token_heads=()) == dataclasses.replace(
        graph_of("qwen2"), family="mimo"
    )
    assert len(graph.next_token_heads) == 2
    for index, head in enumerate(graph.next_token_heads):
        (projection,) = head.projection.parts
        assert projection.name == f"model.mtp_layers.{index}.input_proj.weight"
        assert projection.shape == (64, 128)
        assert all(block.layer == index for block in head.blocks)


def test_gpt2_knows_as_many_positions_as_it_has_embeddings():
    graph = graph_of("gpt2")
    assert graph.max_positions == sizes_of("gpt2")["n_positions"]
    assert graph.ropes == ()


def test_a_name_with_and_without_its_prefix_is_refused(tmp_path):
    checkpoint("gpt2", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"ln_f.bias": tensors["transformer.ln_f.bias"]}, file)
    with pytest.raises(BadFile, match=r"'ln_f\.bias' is there with 'transformer\.'"):
        load_model(tmp_path)


# ---------------------------------------------------------------- refusals


def test_fields_that_are_not_supported_are_refused():
    for name, neutral in _NEUTRAL.items():
        for value in (*neutral, {"any": "thing"}):
            if value in neutral:
                graph_of("llama", **{name: value})
                continue
            with pytest.raises(UnsupportedModel, match=f"field '{name}' is not supported"):
                graph_of("llama", **{name: value})


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("olmoe", {"clip_qkv": 8.0}, "field 'clip_qkv' is not supported by 'olmoe'"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "'use_bidirectional_attention'"),
    ("gemma3_text", {"final_logit_softcapping": 30.0}, "'final_logit_softcapping' is not"),
    ("gpt2", {"add_cross_attention": True}, "'add_cross_attention' is not supported"),
    ("gpt2", {"n_head": 5}, "'n_head' is 5: expected a divisor of n_embd 64"),
    ("gpt2", {"activation_function": "tanh"}, "activation_function 'tanh' is not supported"),
    ("minicpm", {"num_experts": 8}, "'num_experts' is not supported by 'minicpm'"),
    ("minicpm", {"sparse_config": {"topk": 64}}, "'sparse_config' is not supported"),
    ("minicpm", {"scale_depth": None}, "'scale_depth' is None"),
    ("qwen3", {"num_experts": 8}, "'num_experts' is not supported by 'qwen3'"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "'no_rope_layers' is [1, 0]: expected 3 numbers"),
    ("smollm3", {"no_rope_layers": [1, 2, 1]}, "'no_rope_layers'"),
    ("smollm3", {"layer_types": ["sliding_attention"] * 3}, "no sliding_attention where there is"),
    ("phi3", {"sliding_window": 0}, "'sliding_window' is 0"),
    ("mixtral", {"num_experts_per_tok": 7}, "expected a whole number from 1 to 6"),
    ("mixtral", {"num_local_experts": None}, "'num_experts' is missing"),
    ("mixtral", {"num_local_experts": 2**20}, "'num_local_experts' is 1048576"),
    ("qwen3_moe", {"num_local_experts": 5}, "expected the same number as num_local_experts"),
    ("qwen2_moe", {"mlp_only_layers": ["0"]}, "'mlp_only_layers' is ['0']"),
    ("phimoe", {"num_experts_per_tok": 1}, "'num_experts_per_tok' is 1: expected 2"),
    ("nemotron_nas", {"block_configs": []}, "expected a list of 5 objects"),
    ("nemotron_nas", {"block_configs": [1] * 5}, "expected a list of 5 objects"),
    ("nemotron_nas", {"block_configs": [{}] * 5}, "block_configs[0]: field 'attention' is missing"),
    *(
        ("nemotron_nas", puzzle(layer), message)
        for layer, message in (
            ((attention(2, window_length=128), ffn(2.0)), "attention: field 'window_length'"),
            ((attention(2, num_sink_tokens=4), ffn(2.0)), "attention: field 'num_sink_tokens'"),
            ((attention(2), ffn(2.0, sparsify=["x"])), "ffn: field 'sparsify' is not supported"),
            ((attention(3), ffn(2.0)), "'n_heads_in_group' is 3: expected a divisor"),
            ((attention(), ffn(2.0)), "'n_heads_in_group' is None"),
            ((attention(2), ffn()), "'ffn_mult' is None"),
            ((attention(2), ffn(1e-9)), "'ffn_mult' is 1e-09"),
            ((attention(no_op=True), ffn(2.0)), "attention in at least one layer"),
        )
    ),
]


@pytest.mark.parametrize(("family", "change", "message"), REFUSED, ids=lambda item: str(item)[:80])
def test_what_a_family_does_not_do_is_refused(family, change, message):
    with pytest.raises(ModelError) as error:
        graph_of(family, **change)
    assert message in str(error.value)
