"""The families' variants, changes of a config that must show, and changes that must be refused."""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]

HALF = 8  # pairs of a head of 16
FACTORS = [1.0 + 0.15 * index for index in range(HALF)]

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": FACTORS,
    "long_factor": [2 * item for item in FACTORS],
    "original_max_position_embeddings": 32,
    "factor": 2.0,
}
LINEAR = {"rope_type": "linear", "factor": 2.0}


def rope(parameters: Fields, base: float = 10_000.0) -> Fields:
    return {"rope_parameters": parameters | {"rope_theta": base}}


def layer_ropes(full: Fields, full_base: float, local_base: float, **local: Any) -> Fields:
    """Gemma 3's two ropes in the new spelling."""
    local |= {"rope_type": "default", "rope_theta": local_base}
    full = full | {"rope_theta": full_base}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}


def kinds(*letters: str) -> Fields:
    names = {"f": "full_attention", "s": "sliding_attention"}
    return {"layer_types": [names[letter] for letter in letters]}


WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 20,
    "sliding_window": 9,
    "rms_norm_eps": 1e-5,
}
CAPS = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 15.0}
PHI = {"pad_token_id": 0}
PHI_LONGROPE = rope(LONGROPE) | {"original_max_position_embeddings": 32}
MSCALES = {"short_mscale": 1.1, "long_mscale": 1.3}
MINICPM = {"scale_emb": 3.0, "scale_depth": 1.4, "dim_model_base": 32}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 40}
LOCAL_EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2}
MIXER = {"num_local_experts": 6, "router_jitter_noise": 0.3}


def attention(heads_per_group: int | None = None, **more: Any) -> Fields:
    return {
        "n_heads_in_group": heads_per_group,
        "no_op": False,
        "replace_with_linear": False,
    } | more


def ffn(ffn_mult: float | None = None, **more: Any) -> Fields:
    return {"ffn_mult": ffn_mult, "no_op": False, "replace_with_linear": False} | more


def puzzle(*layers: tuple[Fields, Fields]) -> Fields:
    blocks = [{"attention": first, "ffn": second} for first, second in layers]
    return {"num_hidden_layers": len(blocks), "block_configs": blocks, "num_key_value_heads": None}


NO_OP, AS_LINEAR = {"no_op": True}, {"replace_with_linear": True}
PUZZLE_LAYERS = [
    (attention(2), ffn(2.0)),
    (attention(4), ffn(**NO_OP)),
    (attention(**NO_OP), ffn(7.0)),
    (attention(**AS_LINEAR), ffn(**AS_LINEAR)),
    (attention(2), ffn(**AS_LINEAR)),
]
PUZZLE = puzzle(*PUZZLE_LAYERS)


def other_first_layer(first: Fields, second: Fields) -> Fields:
    return puzzle((first, second), *PUZZLE_LAYERS[1:])


# name -> family, config fields
VARIANTS: dict[str, tuple[str, Fields]] = {
    "llama": ("llama", {}),
    "llama, one head each": ("llama", {"num_key_value_heads": 4}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, own head size": ("llama", {"head_dim": 24}),
    "llama, gelu": ("llama", {"hidden_act": "gelu"}),
    "llama, tanh gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama, relu": ("llama", {"hidden_act": "relu"}),
    "llama, base 500000": ("llama", rope({"rope_type": "default"}, 500_000.0)),
    "llama, linear": ("llama", rope(LINEAR)),
    "llama, dynamic": ("llama", rope({"rope_type": "dynamic", "factor": 2.0})),
    "llama, yarn": ("llama", rope(YARN)),
    "llama, yarn untruncated": ("llama", rope(YARN | {"truncate": False})),
    "llama, yarn scales": ("llama", rope(YARN | {"mscale": 1.0, "mscale_all_dim": 0.7})),
    "llama, longrope": ("llama", rope(LONGROPE)),
    "llama, llama3": ("llama", rope(LLAMA3)),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, window above": ("qwen2", WINDOW),
    "qwen2, window everywhere": ("qwen2", WINDOW | {"max_window_layers": 0}),
    "qwen2, layer types": ("qwen2", WINDOW | kinds("s", "f", "s")),
    "qwen2, yarn": ("qwen2", rope(YARN, 1e6)),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3, biases": ("qwen3", {"head_dim": 32, "attention_bias": True}),
    "qwen3, window": ("qwen3", WINDOW | {"head_dim": 32}),
    "qwen3, yarn": ("qwen3", rope(YARN, 1e6) | {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": 9}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "mistral, own head size": ("mistral", {"sliding_window": 9, "head_dim": 24}),
    "mistral, yarn": ("mistral", {"sliding_window": None} | rope(YARN)),
    "gemma2": ("gemma2", GEMMA | CAPS),
    "gemma2, no caps": ("gemma2", GEMMA | dict.fromkeys(CAPS)),
    "gemma2, biases": ("gemma2", GEMMA | CAPS | {"attention_bias": True}),
    "gemma2, untied": ("gemma2", GEMMA | CAPS | {"tie_word_embeddings": False}),
    "gemma2, layer types": ("gemma2", GEMMA | CAPS | kinds("f", "s", "s")),
    "gemma3_text": ("gemma3_text", GEMMA | {"sliding_window_pattern": 2}),
    "gemma3_text, linear": (
        "gemma3_text",
        GEMMA | kinds("f", "s", "s") | layer_ropes(LINEAR, 1e6, 10_000.0),
    ),
    "gemma3_text, biases": ("gemma3_text", GEMMA | kinds("s", "f", "s") | {"attention_bias": True}),
    "gemma3": ("gemma3", GEMMA | {"sliding_window_pattern": 2}),
    "phi3": ("phi3", PHI),
    "phi3, window": ("phi3", PHI | {"sliding_window": 9}),
    "phi3, partial": ("phi3", PHI | rope({"rope_type": "default", "partial_rotary_factor": 0.5})),
    "phi3, longrope": ("phi3", PHI | PHI_LONGROPE),
    "phi3, own head size": ("phi3", PHI | {"head_dim": 24, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "gpt2, hub names": ("gpt2", {}),
    "gpt2, untied": ("gpt2", {"tie_word_embeddings": False, "activation_function": "gelu"}),
    "gpt2, own inner size": ("gpt2", {"n_inner": 80}),
    "gpt2, unscaled": ("gpt2", {"scale_attn_weights": False, "n_head": 16}),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "olmo2": ("olmo2", PHI),
    "olmo2, biases": ("olmo2", PHI | {"attention_bias": True}),
    "olmo2, own head size": ("olmo2", PHI | {"head_dim": 24}),
    "smollm3": ("smollm3", PHI | {"no_rope_layer_interval": 2}),
    "smollm3, listed": ("smollm3", PHI | {"no_rope_layers": [0, 1, 0]}),
    "smollm3, windows": ("smollm3", PHI | WINDOW | {"no_rope_layers": [1, 0, 1]}),
    "smollm3, layer types": ("smollm3", PHI | WINDOW | kinds("s", "f", "s")),
    "smollm3, biases": ("smollm3", PHI | {"attention_bias": True, "mlp_bias": True}),
    "minicpm": ("minicpm", MINICPM),
    "minicpm, biases": ("minicpm", MINICPM | {"attention_bias": True}),
    "minicpm, longrope": ("minicpm", MINICPM | rope(LONGROPE)),
    "nemotron_nas": ("nemotron_nas", PUZZLE),
    "nemotron_nas, biases": ("nemotron_nas", PUZZLE | {"attention_bias": True, "mlp_bias": True}),
    "nemotron_nas, llama3": ("nemotron_nas", PUZZLE | rope(LLAMA3)),
    "mimo": ("mimo", {"num_nextn_predict_layers": 2}),
    "mimo, window": ("mimo", WINDOW | {"num_nextn_predict_layers": 1}),
    "mixtral": ("mixtral", LOCAL_EXPERTS),
    "mixtral, window": ("mixtral", LOCAL_EXPERTS | {"sliding_window": 9}),
    "mixtral, own head size": ("mixtral", LOCAL_EXPERTS | {"head_dim": 24}),
    "qwen2_moe": ("qwen2_moe", SHARED),
    "qwen2_moe, normalised": ("qwen2_moe", SHARED | {"norm_topk_prob": True}),
    "qwen2_moe, every second layer": ("qwen2_moe", SHARED | {"decoder_sparse_step": 2}),
    "qwen2_moe, dense layers": (
        "qwen2_moe",
        SHARED | {"mlp_only_layers": [0, 2], "qkv_bias": False},
    ),
    "qwen2_moe, windows": ("qwen2_moe", SHARED | WINDOW | {"max_window_layers": 2}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "qwen3_moe, normalised": ("qwen3_moe", EXPERTS | {"norm_topk_prob": True, "head_dim": 24}),
    "qwen3_moe, dense layers": (
        "qwen3_moe",
        EXPERTS | {"mlp_only_layers": [1], "attention_bias": True},
    ),
    "qwen3_moe, window": ("qwen3_moe", EXPERTS | WINDOW | {"decoder_sparse_step": 2}),
    "olmoe": ("olmoe", PHI | LOCAL_EXPERTS),
    "olmoe, normalised": ("olmoe", PHI | LOCAL_EXPERTS | {"norm_topk_prob": True}),
    "olmoe, biases": ("olmoe", PHI | LOCAL_EXPERTS | {"attention_bias": True}),
    "phimoe": ("phimoe", MIXER),
    "phimoe, biases": ("phimoe", MIXER | {"attention_bias": True, "lm_head_bias": True}),
    "phimoe, window": ("phimoe", MIXER | {"sliding_window": 9}),
    # As published, which is all that GGUF's keys describe.
    "gemma2, usual scale": ("gemma2", GEMMA | CAPS | {"query_pre_attn_scalar": 16}),
    "gemma3_text, usual scale": (
        "gemma3_text",
        GEMMA
        | kinds("s", "f", "s")
        | layer_ropes(LINEAR, 1e6, 10_000.0)
        | {"query_pre_attn_scalar": 16},
    ),
    "smollm3, usual layers": ("smollm3", PHI | {"num_hidden_layers": 5}),
    "nemotron_nas, no linear MLP": (
        "nemotron_nas",
        puzzle(
            (attention(2), ffn(2.0)),
            (attention(**NO_OP), ffn(7.0)),
            (attention(**NO_OP), ffn(**NO_OP)),
            (attention(**AS_LINEAR), ffn(2.0)),
            (attention(4), ffn(2.0)),
        )
        | rope(LLAMA3),
    ),
    "phi3, wide longrope": (
        "phi3",
        PHI
        | rope(LONGROPE | {"original_max_position_embeddings": 512})
        | {"original_max_position_embeddings": 512, "max_position_embeddings": 1024},
    ),
    "olmoe, one head each": ("olmoe", PHI | LOCAL_EXPERTS | {"num_key_value_heads": 4}),
    "phimoe, usual jitter": (
        "phimoe",
        MIXER | {"router_jitter_noise": 0.01, "attention_bias": True, "lm_head_bias": True},
    ),
    "phimoe, longrope": ("phimoe", MIXER | rope(LONGROPE | MSCALES)),
}
# Scalings whose frequencies change with the length: a long prefill in transformers rotates all its
# rows alike, so the token-by-token run is the one to equal.
BY_POSITION = ("dynamic", "longrope")

# ---------------------------------------------------------------- changes that must show

# rope kind -> its parameters, and a variant that has them
KINDS: dict[str, tuple[Fields, str]] = {
    "default": ({"rope_type": "default"}, "llama"),
    "linear": (LINEAR, "llama, linear"),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, "llama, dynamic"),
    "yarn": (YARN, "llama, yarn"),
    "longrope": (LONGROPE, "llama, longrope"),
    "llama3": (LLAMA3, "llama, llama3"),
}
HALF_ROTARY = {"partial_rotary_factor": 0.5}
HALF_FACTORS = {"short_factor": FACTORS[: HALF // 2], "long_factor": FACTORS[HALF // 2 :]}
OTHER_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
NO_WINDOWS = {"use_sliding_window": False, "layer_types": None}
OF_ANY_FAMILY: list[Fields] = [
    {"rms_norm_eps": 0.05},
    OTHER_HEADS,
    {"rope_parameters": LINEAR},
    {"rope_parameters": None, "rope_theta": 20_000.0},
    {"rope_scaling": {"type": "linear", "factor": 1.1}},
    {"rope_parameters": None} | HALF_ROTARY,
]
FEWER_LAYERS = {"num_hidden_layers": 2, "layer_types": None}
OF_MOST_FAMILIES = [*OF_ANY_FAMILY, {"hidden_act": "gelu"}, FEWER_LAYERS]
UNTIED = [*OF_MOST_FAMILIES, {"tie_word_embeddings": True}]
# Families that read these fields and have a variant of their own name.
FAMILY_CHANGES: dict[str, list[Fields]] = {
    **dict.fromkeys(("llama", "qwen2", "mistral", "phi3", "olmo2", "mimo"), UNTIED),
    "qwen3": [change for change in UNTIED if change is not OTHER_HEADS],
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe"), UNTIED),
    **dict.fromkeys(("smollm3", "minicpm"), OF_MOST_FAMILIES),
    "gemma2": [*OF_ANY_FAMILY, FEWER_LAYERS],
    "nemotron_nas": [*OF_ANY_FAMILY, {"hidden_act": "gelu"}, {"tie_word_embeddings": True}],
}
# variant -> changed fields; each must move the logits by more than 100 tolerances
CHANGES: list[tuple[str, Fields]] = [
    *((family, change) for family, changes in FAMILY_CHANGES.items() for change in changes),
    *((variant, rope(parameters, 20_000.0)) for parameters, variant in KINDS.values()),
    *(
        (variant, rope(parameters | HALF_ROTARY | (HALF_FACTORS if kind == "longrope" else {})))
        for kind, (parameters, variant) in KINDS.items()
    ),
    ("llama, gelu", {"hidden_act": "gelu_pytorch_tanh"}),
    ("llama, biases", {"attention_bias": False}),
    ("llama, biases", {"mlp_bias": False}),
    ("llama, linear", rope(LINEAR | {"factor": 2.2})),
    ("llama, dynamic", rope({"rope_type": "dynamic", "factor": 3.0})),
    ("llama, dynamic", {"max_position_embeddings": 96}),
    ("llama, yarn", rope(YARN | {"factor": 4.4})),
    ("llama, yarn", rope(YARN | {"original_max_position_embeddings": 64})),
    ("llama, yarn", rope(YARN | {"attention_factor": 1.0})),
    ("llama, yarn untruncated", rope(YARN | {"truncate": False, "beta_fast": 2.0})),
    ("llama, yarn", rope(YARN | {"beta_slow": 0.2})),
    ("llama, yarn", rope(YARN | {"mscale": 1.0, "mscale_all_dim": 0.7})),
    ("llama, yarn", rope(YARN | {"truncate": False})),
    ("llama, yarn", {"original_max_position_embeddings": 64}),
    ("llama, longrope", rope(LONGROPE | {"short_factor": FACTORS[::-1]})),
    ("llama, longrope", rope(LONGROPE | {"long_factor": FACTORS})),
    ("llama, longrope", rope(LONGROPE | {"original_max_position_embeddings": 48})),
    ("llama, longrope", rope(LONGROPE | {"factor": 4.0})),
    ("llama, longrope", rope(LONGROPE | {"attention_factor": 1.0})),
    ("llama, longrope", rope(LONGROPE | {"short_mscale": 1.0})),
    ("llama, longrope", rope(LONGROPE | {"long_mscale": 1.0})),
    ("llama, llama3", rope(LLAMA3 | {"factor": 4.0})),
    ("llama, llama3", rope(LLAMA3 | {"low_freq_factor": 0.5})),
    ("llama, llama3", rope(LLAMA3 | {"high_freq_factor": 6.0})),
    ("llama, llama3", rope(LLAMA3 | {"original_max_position_embeddings": 64})),
    ("qwen2, yarn", {"original_max_position_embeddings": 64}),
    ("qwen2, window above", NO_WINDOWS),
    ("qwen2, window above", {"sliding_window": 10}),
    ("qwen2, window above", {"max_window_layers": 2, "layer_types": None}),
    ("qwen2, layer types", kinds("s", "s", "s")),
    ("qwen3, biases", {"attention_bias": False}),
    ("qwen3, window", NO_WINDOWS),
    ("qwen3, window", {"sliding_window": 10}),
    ("qwen3, window", {"max_window_layers": 2, "layer_types": None}),
    ("qwen3, window", kinds("s", "s", "s")),
    ("qwen3, yarn", {"original_max_position_embeddings": 64}),
    ("qwen3, yarn", OTHER_HEADS),
    ("mistral", {"sliding_window": 10}),
    ("mistral", {"sliding_window": None}),
    ("mistral, yarn", {"original_max_position_embeddings": 64}),
    ("gemma2", {"hidden_activation": "silu"}),
    ("gemma2", {"query_pre_attn_scalar": 22}),
    ("gemma2", {"sliding_window": 10}),
    ("gemma2", {"attn_logit_softcapping": 18.0}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": 14.0}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", kinds("s", "s", "s")),
    ("gemma2, biases", {"attention_bias": False}),
    ("gemma2, untied", {"tie_word_embeddings": True}),
    ("gemma3_text", {"rms_norm_eps": 0.05}),
    ("gemma3_text", {"hidden_activation": "silu"}),
    ("gemma3_text", {"query_pre_attn_scalar": 22}),
    ("gemma3_text", {"sliding_window": 10}),
    ("gemma3_text", OTHER_HEADS),
    ("gemma3_text", FEWER_LAYERS | kinds("s", "s")),
    ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 3}),
    (
        "gemma3_text",
        {"layer_types": None, "sliding_window_pattern": None, "_sliding_window_pattern": 3},
    ),
    ("gemma3_text", {"rope_parameters": None, "rope_theta": 20_000.0}),
    ("gemma3_text", {"rope_parameters": None, "rope_local_base_freq": 20_000.0}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("gemma3_text", HALF_ROTARY),
    ("gemma3_text", layer_ropes({"rope_type": "default"}, 20_000.0, 10_000.0)),
    ("gemma3_text", layer_ropes({"rope_type": "default"}, 1e6, 20_000.0)),
    ("gemma3_text", layer_ropes({"rope_type": "default"} | HALF_ROTARY, 1e6, 10_000.0)),
    ("gemma3_text", layer_ropes({"rope_type": "default"}, 1e6, 10_000.0, **HALF_ROTARY)),
    ("gemma3_text, linear", layer_ropes(LINEAR | {"factor": 2.2}, 1e6, 10_000.0)),
    ("gemma3_text, linear", kinds("s", "s", "s")),
    ("gemma3_text, biases", {"attention_bias": False}),
    ("phi3", {"sliding_window": 9}),
    ("phi3, longrope", {"original_max_position_embeddings": 48}),
    ("gpt2", {"layer_norm_epsilon": 0.05}),
    ("gpt2", {"activation_function": "relu"}),
    ("gpt2", {"n_head": 8}),
    ("gpt2", {"n_layer": 2}),
    ("gpt2", {"scale_attn_weights": False}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2, untied", {"tie_word_embeddings": True}),
    ("olmo2, biases", {"attention_bias": False}),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 3}),
    ("smollm3", {"no_rope_layers": [1, 1, 1]}),
    ("smollm3, windows", {"use_sliding_window": False, "layer_types": None}),
    ("smollm3, windows", {"sliding_window": 10}),
    ("smollm3, windows", kinds("s", "s", "s")),
    ("smollm3, biases", {"attention_bias": False}),
    ("smollm3, biases", {"mlp_bias": False}),
    ("minicpm", {"scale_emb": 3.3}),
    ("minicpm", {"scale_depth": 1.5}),
    ("minicpm", {"dim_model_base": 33}),
    ("minicpm, biases", {"attention_bias": False}),
    ("minicpm, longrope", {"original_max_position_embeddings": 48}),
    ("nemotron_nas, biases", {"attention_bias": False}),
    ("nemotron_nas, biases", {"mlp_bias": False}),
    ("nemotron_nas, llama3", {"original_max_position_embeddings": 64}),
    ("mimo, window", NO_WINDOWS),
    ("mimo, window", {"sliding_window": 10}),
    ("mimo, window", {"max_window_layers": 2, "layer_types": None}),
    ("mimo, window", kinds("s", "s", "s")),
    ("mixtral", {"num_experts_per_tok": 3}),
    ("mixtral", {"sliding_window": 9}),
    ("qwen2_moe", {"num_experts_per_tok": 3}),
    ("qwen2_moe", {"norm_topk_prob": True}),
    ("qwen2_moe", {"qkv_bias": False}),
    ("qwen2_moe, windows", NO_WINDOWS),
    ("qwen2_moe, windows", {"sliding_window": 10}),
    ("qwen2_moe, windows", {"max_window_layers": 3, "layer_types": None}),
    ("qwen2_moe, windows", kinds("s", "s", "s")),
    ("qwen3_moe", {"num_experts_per_tok": 3}),
    ("qwen3_moe", {"norm_topk_prob": True}),
    ("qwen3_moe, dense layers", {"attention_bias": False}),
    ("qwen3_moe, window", {"use_sliding_window": False}),
    ("qwen3_moe, window", {"sliding_window": 10}),
    ("olmoe", {"num_experts_per_tok": 3}),
    ("olmoe", {"norm_topk_prob": True}),
    ("olmoe, biases", {"attention_bias": False}),
    ("phimoe", {"router_jitter_noise": 0.1}),
    ("phimoe", {"sliding_window": 9}),
    ("phimoe, biases", {"attention_bias": False}),
    ("phimoe, biases", {"lm_head_bias": False}),
    ("phimoe, longrope", {"original_max_position_embeddings": 48}),
]

# ---------------------------------------------------------------- changes that must change nothing

GLOBAL_ROPE = {"rope_parameters": None, "rope_theta": 1e6}
# variant, the same in other words
SPELLINGS: list[tuple[str, Fields]] = [
    ("llama", {"head_dim": None, "attention_bias": None}),
    ("qwen2, window above", {"layer_types": None}),
    ("mistral", {"head_dim": None}),
    ("mistral, no window", {"rope_parameters": None, "rope_theta": 10_000.0}),
    ("gemma2", {"layer_types": None, "tie_word_embeddings": None}),
    ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 2}),
    (
        "gemma3_text",
        {"layer_types": None, "sliding_window_pattern": None, "_sliding_window_pattern": 2},
    ),
    ("gemma3_text", GLOBAL_ROPE | {"rope_local_base_freq": 10_000}),
    ("gemma3_text, linear", GLOBAL_ROPE | {"rope_scaling": LINEAR}),
    ("phi3, window", {"num_attention_heads": 4.0}),
    *(
        (
            "phi3, longrope",
            {"rope_parameters": None, "rope_scaling": LONGROPE | {"type": name, "rope_type": None}},
        )
        for name in ("longrope", "su")
    ),
    ("phi3, longrope", rope(LONGROPE | {"factor": None, "original_max_position_embeddings": 9})),
    ("gpt2", {"tie_word_embeddings": None, "n_inner": 256}),
    ("smollm3", {"no_rope_layers": None, "layer_types": None, "tie_word_embeddings": None}),
    ("smollm3, windows", {"layer_types": None}),
    ("minicpm", {"tie_word_embeddings": None}),
    ("nemotron_nas", {"model_type": "nemotron_nas"}),
    ("qwen2_moe, windows", {"layer_types": None}),
    ("qwen3_moe", {"num_local_experts": None, "num_experts": 6}),
    ("qwen3_moe", {"num_experts": 6}),
]

# ---------------------------------------------------------------- changes that must be refused

# variant, changed fields, a fragment of the error: most ask for tensors that are not there, or have
# no place for some
REFUSED_CHANGES: list[tuple[str, Fields, str]] = [
    ("llama", {"attention_bias": True}, "'model.layers.0.self_attn.q_proj.bias' is missing"),
    ("llama, biases", {"attention_bias": False}, "has no place"),
    ("gpt2", {"n_embd": 32}, "the config expects"),
    ("gpt2", {"n_positions": 100}, "the config expects"),
    ("gpt2", {"n_inner": 80}, "the config expects"),
    ("gpt2, own inner size", {"n_inner": None}, "the config expects"),
    ("gpt2", {"tie_word_embeddings": False}, "'lm_head.weight' is missing"),
    ("smollm3", {"tie_word_embeddings": False}, "'lm_head.weight' is missing"),
    ("minicpm", {"tie_word_embeddings": False}, "'lm_head.weight' is missing"),
    ("gemma3_text", {"tie_word_embeddings": False}, "'lm_head.weight' is missing"),
    ("mimo", {"num_nextn_predict_layers": 3}, "'model.mtp_layers.2.hidden_layernorm.weight'"),
    ("mixtral", {"num_local_experts": 5}, "the config expects"),
    ("mixtral", {"num_local_experts": 7}, "the config expects"),
    ("mixtral", {"num_experts": 7}, "the same number as num_local_experts"),
    ("olmoe", {"num_local_experts": 7}, "the same number as num_local_experts"),
    ("qwen2_moe", {"num_local_experts": 7}, "the same number as num_local_experts"),
    ("phimoe", {"num_experts": 7}, "the same number as num_local_experts"),
    ("phimoe", {"num_experts_per_tok": 3}, "'num_experts_per_tok' is 3: expected 2"),
    ("olmoe", {"num_experts": 5}, "the config expects"),
    ("phimoe", {"num_local_experts": 5}, "the config expects"),
    ("phimoe, biases", {"lm_head_bias": False}, "'lm_head.bias' has no place"),
    ("qwen2_moe", {"num_experts": 5}, "the config expects"),
    ("qwen2_moe", {"decoder_sparse_step": 2}, "'model.layers.0.mlp.gate_proj.weight' is missing"),
    ("qwen2_moe", {"mlp_only_layers": [1]}, "'model.layers.1.mlp.gate_proj.weight' is missing"),
    ("qwen2_moe", {"moe_intermediate_size": 40}, "the config expects"),
    ("qwen2_moe", {"shared_expert_intermediate_size": 48}, "the config expects"),
    ("qwen3_moe", {"num_local_experts": 5}, "the config expects"),
    ("qwen3_moe", {"num_experts": 7}, "the same number as num_local_experts"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "'model.layers.0.mlp.gate_proj.weight' is missing"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, "'model.layers.1.mlp.gate_proj.weight' is missing"),
    ("qwen3_moe", {"moe_intermediate_size": 40}, "the config expects"),
    ("nemotron_nas", puzzle(*PUZZLE_LAYERS[:4]), "'model.layers.4."),
    *(
        ("nemotron_nas", other_first_layer(first, second), message)
        for first, second, message in (
            (attention(4), ffn(2.0), "the config expects"),
            (attention(2), ffn(7.0), "the config expects"),
            (attention(2, **NO_OP), ffn(2.0), "has no place"),
            (attention(2), ffn(2.0, **NO_OP), "has no place"),
            (attention(2, **AS_LINEAR), ffn(2.0), "'model.layers.0.self_attn.linear_attn.weight'"),
            (attention(2), ffn(2.0, **AS_LINEAR), "'model.layers.0.mlp.linear_mlp.weight'"),
        )
    ),
]
