"""Every architecture that we write and read: llama.cpp loads the file and gives the same logits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from peer import PYTHON

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from checkpoints import checkpoint, make_executor, random_tokens, run_logits
from test_gguf_models import CANNOT_SAY, write
from variants import VARIANTS

from vivace.models.loading import load_model

# It looks GELU up in a table of 16-bit numbers.
BY_TABLE = ("gemma2", "gemma3_text", "gpt2")
# It takes the softmax of the chosen experts where the model's router mixes sparsely.
OTHER_ROUTING = ("phimoe",)
# It knows no window in these architectures: texts are shorter than the window.
NO_WINDOW, WITHIN_WINDOW = ("mistral", "mixtral", "phi3"), 9
# Shapes and biases that no published model has: it refuses to load them.
NOT_LOADED = (
    *("qwen3, biases", "olmo2, biases", "smollm3, biases", "olmoe, biases"),
    *("phi3, own head size", "olmo2, own head size", "olmoe"),
)
# It takes the long frequencies for all positions of a context of 256, which is its smallest.
LONG_AT_ONCE = ("llama, longrope", "phi3, longrope", "minicpm, longrope")
VARIANTS_WRITTEN = [
    name
    for name, (family, _) in VARIANTS.items()
    if name not in {*CANNOT_SAY, *NOT_LOADED, *LONG_AT_ONCE} and family not in OTHER_ROUTING
]


@pytest.mark.parametrize("variant", VARIANTS_WRITTEN)
def test_logits_equal_llama_cpp(variant, tmp_path):
    family, fields = VARIANTS[variant]
    checkpoint(variant, tmp_path)
    file = tmp_path / "model.gguf"
    write(load_model(tmp_path), file)
    is_short = fields.get("sliding_window") and family in NO_WINDOW
    tokens = random_tokens(WITHIN_WINDOW if is_short else 30)
    np.save(tmp_path / "tokens.npy", tokens[None])
    script = Path(__file__).with_name("llama_logits.py")
    files = (file, tmp_path / "tokens.npy", tmp_path / "logits.npy")
    done = subprocess.run([PYTHON, script, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = np.load(tmp_path / "logits.npy")[0]
    model = load_model(file)
    logits = run_logits(make_executor("native", model.graph, model.weights), tokens, 7)
    tolerance = 0.05 if family in BY_TABLE else 2e-4
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance)
