"""Run by the peers' interpreter: llama.cpp's logits of given tokens.

    python llama_logits.py MODEL.gguf TOKENS.npy OUT.npy

TOKENS is [sequences, n] int32, OUT becomes [sequences, n, vocab] float32. The cache is float32 and
attention plain, so that what differs from another engine is the arithmetic of matrices alone.
"""

from __future__ import annotations

import ctypes
import importlib
import sys

import numpy as np

llama_cpp = importlib.import_module("llama_cpp")  # not in the Python that checks types


def logits(model_path: str, sequences: np.ndarray) -> np.ndarray:
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.use_mmap = True
    # No weight is repacked for this machine, which would change what is compared.
    if hasattr(model_params, "use_extra_bufts"):
        model_params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(model_path.encode(), model_params)
    if not model:
        raise SystemExit("llama.cpp does not load it")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = max(sequences.shape[1], 32)
    params.n_batch = params.n_ubatch = max(sequences.shape[1], 32)
    params.type_k = params.type_v = 0  # GGML_TYPE_F32
    params.flash_attn_type = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise SystemExit("llama.cpp makes no context of it")
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    return np.stack([run(context, tokens, size) for tokens in sequences])


def run(context: ctypes.c_void_p, tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Logits [n, vocab_size] of one sequence, alone in the cache."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    for index, token in enumerate(tokens):
        batch.token[index] = int(token)
        batch.pos[index] = index
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = 0
        batch.logits[index] = 1
    batch.n_tokens = len(tokens)
    if llama_cpp.llama_decode(context, batch) != 0:
        raise SystemExit("llama.cpp does not run it")
    floats = ctypes.POINTER(ctypes.c_float)
    rows = [
        np.ctypeslib.as_array(
            ctypes.cast(llama_cpp.llama_get_logits_ith(context, index), floats), (vocab_size,)
        ).copy()
        for index in range(len(tokens))
    ]
    llama_cpp.llama_batch_free(batch)
    return np.stack(rows)


if __name__ == "__main__":
    np.save(sys.argv[3], logits(sys.argv[1], np.load(sys.argv[2])))
