"""Run by the peers' interpreter: llama.cpp quantizes a file.

python llama_quantize.py SOURCE.gguf TARGET.gguf FILE_TYPE
"""

from __future__ import annotations

import ctypes
import importlib
import sys

llama_cpp = importlib.import_module("llama_cpp")  # not in the Python that checks types

if __name__ == "__main__":
    source, target, file_type = sys.argv[1:]
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = int(file_type)
    code = llama_cpp.llama_model_quantize(
        source.encode(), target.encode(), ctypes.byref(parameters)
    )
    sys.exit(code)
