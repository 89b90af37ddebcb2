"""Other CPUs, emulated: each picks the kernels that it can run, whose outputs are this one's bits.

A kernel that was compiled for more than its CPU has is an illegal instruction here.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf_files import random_blocks
from test_block_formats import SCALES
from test_integer import inputs, matrix_of
from test_linear import STORAGE
from test_table import make

from vivace import _native
from vivace.techniques.weight_formats.base import Packed

EMULATOR = shutil.which("qemu-x86_64")
PROGRAM = Path(__file__).with_name("linear_digests.py")
INTEGERS = [  # with numbers of outputs and inputs; 77 outputs are a group of panels and an odd one
    ("int8/row/float32", 77, 200),
    ("int8/128/bfloat16/zeros", 21, 384),
    ("int4/32/bfloat16/zeros", 77, 1056),
    ("int4/32/e8m0", 5, 96),
    ("int3/64/float32", 37, 192),
    ("int2/row/bfloat16/zeros", 19, 33),
    ("q4_0", 48, 160),
    ("q8_0", 80, 96),
    ("q4_k", 32, 512),
    ("q6_k", 80, 256),
]
TABLES = ["own8", "own64", "nvfp4", "fp8", "fp8_e5m2", "afpq3", "codebook4"]
DECODED = ["q2_k", "q5_k", "iq4_nl"]  # blocks
CPUS = {
    "Nehalem": "generic",
    "SandyBridge": "generic",  # AVX alone
    "Haswell,-fma": "generic",
    "Haswell,-bmi2": "generic",
    "Haswell,-movbe": "generic",
    "Haswell,-abm": "generic",  # lzcnt would run as bsr there, with other results
    "Haswell": "avx2",
}


def why_not() -> str:
    """Why CPUs cannot be emulated here; empty if they can."""
    if platform.machine() != "x86_64":
        return "one instruction set only"
    if EMULATOR is None:
        return "qemu-x86_64 (of the package qemu-user) is not installed"
    version = subprocess.check_output([EMULATOR, "--version"], text=True)
    found = re.search(r"version (\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < (7, 2):
        return "qemu-x86_64 is older than 7.2, the first with AVX2"
    return ""


pytestmark = pytest.mark.skipif(why_not() != "", reason=why_not())


def run(*command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "VIVACE_ISA"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def emulate(cpu: str, *arguments: str) -> str:
    assert EMULATOR is not None
    return run(EMULATOR, "-cpu", cpu, sys.executable, *arguments)


def sized(*shape: int) -> np.ndarray:
    """Random numbers of magnitudes 0.5 to 2: no float16 or float of 8 bits of them is denormal.

    Those QEMU takes for zero, since float32 ones are: no CPU does (Intel SDM, VCVTPH2PS).
    """
    rng = np.random.default_rng(shape)
    return (rng.uniform(0.5, 2, shape) * rng.choice((-1, 1), shape)).astype(np.float32)


def with_usual_scales(packed: Packed) -> Packed:
    """Blocks get float16 scales that are normal and below 2, for the same reason."""
    name = packed.kernel.upper()
    if name not in SCALES:
        return packed
    _, block_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    data = packed.data.copy()
    for at in SCALES[name]:
        high = data.reshape(-1, block_bytes)[:, at + 1]
        high &= 0xBF
        high |= 0x04
    return Packed(packed.kernel, packed.shape, data)


def cases() -> list[tuple[Packed, np.ndarray]]:
    """Matrices and their inputs [M, K]."""
    found = []
    for kernel, num_rows, num_columns in INTEGERS:
        packed = with_usual_scales(matrix_of(kernel, num_rows, num_columns))
        found.append((packed, inputs(num_columns)[:9]))
    for name in TABLES:
        found.append((make(name).pack(sized(19, 1152)), sized(9, 1152)))
    for kernel in DECODED:
        packed = Packed(kernel, (19, 1280), random_blocks(kernel.upper(), 19, 1280))
        found.append((with_usual_scales(packed), sized(9, 1280)))
    for name, storage in STORAGE.items():
        weight = sized(19, 517).astype(storage)
        found.append((Packed(name, weight.shape, weight.view(np.uint8)), sized(9, 517)))
    return found


@pytest.fixture(scope="module")
def case_file(tmp_path_factory) -> str:
    """A file as linear_digests.py reads it."""
    arrays: dict[str, Any] = {"kernels": np.array([packed.kernel for packed, _ in cases()])}
    for i, (packed, x) in enumerate(cases()):
        bias = np.linspace(-1, 1, packed.shape[0], dtype=np.float32)
        arrays |= {f"x{i}": x, f"bias{i}": bias, f"data{i}": packed.data}
        arrays[f"shape{i}"] = np.array(packed.shape)
    path = tmp_path_factory.mktemp("emulated") / "cases.npz"
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture(scope="module")
def own_digests(case_file: str) -> dict[str, str]:
    isa, digests = json.loads(run(sys.executable, str(PROGRAM), case_file))
    assert isa == _native.isa_names()[-1]
    return digests


@pytest.mark.parametrize("cpu", ["Nehalem", "Haswell"])
def test_outputs_are_the_same_bits_on_another_cpu(cpu: str, case_file: str, own_digests) -> None:
    isa, digests = json.loads(emulate(cpu, str(PROGRAM), case_file))
    assert isa == CPUS[cpu]
    assert digests == own_digests
    assert len(digests) == len(cases())


@pytest.mark.parametrize("cpu", CPUS)
def test_a_cpu_runs_the_best_that_it_has(cpu: str) -> None:
    program = "from vivace import _native; print(*_native.isa_names(), _native.selected_isa())"
    best = CPUS[cpu]
    names = ["generic"] if best == "generic" else ["generic", "avx2"]
    assert emulate(cpu, "-c", program).split() == [*names, best]
