"""A family's graph under the tensor names of a GGUF file: the same blocks, stored another way.

GGUF stacks experts into one tensor, may fuse what reads the same input, adds the one of Gemma's
norms to their weights, stores GPT-2's matrices as (out, in), and orders the rows of some queries
and keys so that rotary pairs are neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from vivace.blocks import (
    AttentionBlock,
    Block,
    Expert,
    ExpertsBlock,
    LinearBlock,
    LinearSpec,
    MlpBlock,
    ModelGraph,
    NormSpec,
    WeightRef,
)
from vivace.errors import UnsupportedModel
from vivace.models.gguf.architectures import Architecture

__all__ = ["stored_as_gguf"]

_OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.linear_attn": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
# Behind attention stands the norm before the MLP, or where there are both, one of its own.
_NORMS = {"post_attention_layernorm": "ffn_norm"}
_POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)")
_EXPERT_PARTS = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
}
_LAYER = re.compile(r"(?:model\.layers|h)\.(\d+)\.(.+)")


def stored_as_gguf(
    graph: ModelGraph, architecture: Architecture, tensors: Collection[str] = ()
) -> ModelGraph:
    """The graph with the references that a GGUF file of this architecture needs.

    Args:
        graph: the family's, with the names of a checkpoint on the hub.
        architecture: how the family is stored.
        tensors: names in the file, where there is one: parts that it fuses are found there.
    """
    names = _Names(architecture, frozenset(tensors))
    positions = graph.embedding.positions
    embedding = replace(
        graph.embedding,
        weight=names.reference(graph.embedding.weight),
        positions=None if positions is None else names.reference(positions),
    )
    head = replace(
        graph.head, linear=names.linear(graph.head.linear), norm=names.norm(graph.head.norm)
    )
    ropes = graph.ropes
    if architecture.rotates_pairs:
        ropes = tuple(replace(rope, is_interleaved=True) for rope in ropes)
    blocks = tuple(names.block(block) for block in graph.blocks)
    return replace(graph, embedding=embedding, head=head, ropes=ropes, blocks=blocks)


class _Names:
    def __init__(self, architecture: Architecture, tensors: frozenset[str]) -> None:
        norms = _POST_NORMS if architecture.has_post_norms else _NORMS
        self._inner, self._tensors = _INNER | norms, tensors

    def reference(self, ref: WeightRef) -> WeightRef:
        name, first_row = self._place(ref)
        return replace(ref, name=name, first_row=first_row, is_transposed=False)

    def _place(self, ref: WeightRef) -> tuple[str, int]:
        """A tensor's name, and the row at which the reference begins there."""
        stem, _, kind = ref.name.rpartition(".")
        found = _LAYER.fullmatch(stem)
        if found is None:
            return f"{_name(_OUTER, stem, ref)}.{kind}", ref.first_row
        prefix, inner = f"blk.{found[1]}", found[2]
        expert = _EXPERT.fullmatch(inner)
        if expert is None:
            return f"{prefix}.{_name(self._inner, inner, ref)}.{kind}", ref.first_row
        index, part = int(expert[1]), _EXPERT_PARTS[expert[2]]
        single = f"{prefix}.ffn_{part}.{index}.{kind}"  # as files of early mixtures have it
        if single in self._tensors:
            return single, 0
        return f"{prefix}.ffn_{part}_exps.{kind}", index * ref.shape[0]

    def norm(self, norm: NormSpec | None) -> NormSpec | None:
        if norm is None:
            return None
        bias = None if norm.bias is None else self.reference(norm.bias)
        return replace(norm, weight=self.reference(norm.weight), bias=bias, unit_offset=False)

    def linear(self, spec: LinearSpec, fused: str | None = None) -> LinearSpec:
        """The group, whose parts may be rows of one tensor with `fused` in its name."""
        parts, biases, first_row = [], [], 0
        for part, bias in zip(spec.parts, spec.biases, strict=True):
            parts.append(self._in_group(part, fused, first_row))
            biases.append(None if bias is None else self._in_group(bias, fused, first_row))
            first_row += part.shape[0]
        return replace(spec, parts=tuple(parts), biases=tuple(biases))

    def _in_group(self, ref: WeightRef, fused: str | None, first_row: int) -> WeightRef:
        own = self.reference(ref)
        if fused is None or own.name in self._tensors:
            return own
        whole = _beside(own.name, fused)
        return replace(own, name=whole, first_row=first_row) if whole in self._tensors else own

    def block(self, block: Block) -> Block:
        norm, post_norm = self.norm(block.norm), self.norm(block.post_norm)
        match block:
            case AttentionBlock():
                changes = {
                    "qkv": self.linear(block.qkv, "attn_qkv"),
                    "out": self.linear(block.out),
                    "q_norm": self.norm(block.q_norm),
                    "k_norm": self.norm(block.k_norm),
                }
            case MlpBlock():
                changes = {"gate_up": self.linear(block.gate_up), "down": self.linear(block.down)}
            case LinearBlock():
                changes = {"linear": self.linear(block.linear)}
            case ExpertsBlock():
                shared = block.shared
                changes = {
                    "router": self.linear(block.router),
                    "experts": tuple(
                        self.expert(expert, index) for index, expert in enumerate(block.experts)
                    ),
                    "shared": None if shared is None else self.expert(shared),
                    "shared_gate": None
                    if block.shared_gate is None
                    else self.linear(block.shared_gate),
                }
        return replace(block, norm=norm, post_norm=post_norm, **changes)

    def expert(self, expert: Expert, index: int | None = None) -> Expert:
        return Expert(self._gate_up(expert.gate_up, index), self.linear(expert.down))

    def _gate_up(self, spec: LinearSpec, index: int | None) -> LinearSpec:
        """Gates and ups, which a file may stack expert by expert in one tensor."""
        own = self.linear(spec)
        if index is None or own.parts[0].name in self._tensors:
            return own
        whole = _beside(own.parts[0].name, "ffn_gate_up_exps")
        if whole not in self._tensors:
            return own
        first_row, parts = index * spec.out_features, []
        for part in own.parts:
            parts.append(replace(part, name=whole, first_row=first_row))
            first_row += part.shape[0]
        return replace(own, parts=tuple(parts))


def _name(names: Mapping[str, str], stem: str, ref: WeightRef) -> str:
    if stem not in names:
        raise UnsupportedModel(
            f"GGUF has no name for the tensor '{ref.name}': keep the model as safetensors"
        )
    return names[stem]


def _beside(name: str, stem: str) -> str:
    """`blk.N.STEM.weight` for a tensor `blk.N.other.weight`."""
    *layer, _, kind = name.split(".")
    return ".".join([*layer[:2], stem, kind])
