"""Program of test_emulated.py: multiplies the matrices of a file, and prints what came out.

The file is a .npz with `kernels` and, for each place i in it, `x{i}` [M, K], `bias{i}` [N],
`shape{i}` and `data{i}`. Standard output: a line of JSON, the instruction set that runs and for
each kernel a digest of the outputs of the first 1, 3 and M rows.
"""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np

from vivace import _native
from vivace.techniques.weight_formats.base import Packed


def digest(packed: Packed, bias: np.ndarray, x: np.ndarray) -> str:
    linear = _native.Linear([(packed, bias)])
    outputs = b"".join(linear(x[:rows]).tobytes() for rows in (1, 3, len(x)))
    return hashlib.sha256(outputs).hexdigest()


def main(path: str) -> None:
    digests = {}
    with np.load(path) as cases:
        for i, kernel in enumerate(cases["kernels"].tolist()):
            num_rows, num_columns = cases[f"shape{i}"].tolist()
            packed = Packed(kernel, (num_rows, num_columns), cases[f"data{i}"])
            digests[kernel] = digest(packed, cases[f"bias{i}"], cases[f"x{i}"])
    print(json.dumps([_native.selected_isa(), digests]))


if __name__ == "__main__":
    main(sys.argv[1])
