"""No instruction set leaks: zmm registers only in AVX-512 code, ymm ones never in generic code."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys

import pytest

from vivace import _native

pytestmark = [
    pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set only"),
]

FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
WIDE = ("avx512bf16::", "avx512vnni::", "avx512::")


@pytest.fixture(scope="module")
def registers() -> dict[str, set[str]]:
    """Function name -> kinds of vector registers that its code names."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", _native.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found: dict[str, set[str]] = {}
        kinds: set[str] = set()
        for line in process.stdout:
            if match := FUNCTION.match(line):
                kinds = found.setdefault(match[1], set())
            else:
                kinds.update(kind for kind in ("%xmm", "%ymm", "%zmm") if kind in line)
    assert process.returncode == 0
    return found


def is_kernel_of(name: str, *spaces: str) -> bool:
    return any(f"vivace::{space}" in name for space in spaces)


def test_kernels_are_found(registers: dict[str, set[str]]) -> None:
    for space, kind in (*((wide, "%zmm") for wide in WIDE), ("avx2::", "%ymm")):
        assert any(is_kernel_of(name, space) and kind in used for name, used in registers.items())
    assert any(is_kernel_of(name, "generic::") for name in registers)


def test_512_bit_registers_stay_in_avx512_code(registers: dict[str, set[str]]) -> None:
    leaks = [n for n, used in registers.items() if "%zmm" in used and not is_kernel_of(n, *WIDE)]
    assert leaks == []


def test_256_bit_registers_stay_out_of_generic_code(registers: dict[str, set[str]]) -> None:
    spaces = (*WIDE, "avx2::")
    leaks = [n for n, used in registers.items() if "%ymm" in used and not is_kernel_of(n, *spaces)]
    assert leaks == []


@pytest.mark.parametrize("isa", _native.isa_names())
def test_the_environment_chooses_the_instruction_set(isa: str) -> None:
    code = "from vivace import _native; print(_native.selected_isa())"
    environment = {**os.environ, "VIVACE_ISA": isa}
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, env=environment, text=True).strip() == isa


def test_an_unknown_instruction_set_is_a_clear_error() -> None:
    code = "from vivace import _native; _native.selected_isa()"
    environment = {**os.environ, "VIVACE_ISA": "sse9"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "'sse9' (from the environment variable VIVACE_ISA) is unknown: use one of" in run.stderr
