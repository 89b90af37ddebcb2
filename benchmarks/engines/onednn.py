"""What oneDNN reaches through torch: 512 rows of 8-bit integers times a layer's matrices."""

from __future__ import annotations

import json
import sys
import time

import torch

from benchmarks import harness


def operations_per_second(shapes: list[tuple[int, int]], num_rows: int = 512) -> float:
    """Of the product of rows [num_rows, k] with matrices [k, n] of these shapes, the best of 3."""
    matrices = [torch.randint(-127, 127, shape, dtype=torch.int8) for shape in shapes]
    rows = {k: torch.randint(-127, 127, (num_rows, k), dtype=torch.int8) for k, _ in shapes}
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for matrix in matrices:
            torch.ops.aten._int_mm(rows[matrix.shape[0]], matrix)
        seconds.append(time.perf_counter() - start)
    return 2 * num_rows * sum(k * n for k, n in shapes) / min(seconds)


if __name__ == "__main__":
    torch.set_num_threads(json.loads(sys.argv[1])["threads"])
    harness.serve({"multiply": lambda shapes: {"operations": operations_per_second(shapes)}})
