"""The CUDA sources compile where a CUDA compiler is, to the instructions that they were written for."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
INSTALLED = REPOSITORY / "misa_vllm/_cuda.so"
TENSOR_CORE_KERNELS = ("score_kernel", "decode_select_kernel", "rerank_kernel")
"""Kernels whose products are FP8 on the tensor cores."""
pytestmark = pytest.mark.skipif(
    not (REPOSITORY / "setup.py").exists(), reason="the tests run outside of the source tree"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The built extension; compiled here, which takes minutes, where it is not installed."""
    if INSTALLED.exists():
        return INSTALLED
    if not (os.environ.get("NVCC") or shutil.which("nvcc")):
        pytest.skip("no CUDA compiler")
    folder = tmp_path_factory.mktemp("cuda")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder, "--build-temp", folder / "objects"]
    finished = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, "MISA_BUILD_EXT": "cuda"}, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return folder / "misa_vllm/_cuda.so"


def find_cuobjdump() -> str | None:
    """CUDA's disassembler: of the toolkit, or the one that Triton brings along."""
    triton = importlib.util.find_spec("triton")
    brought = Path(triton.origin).parent / "backends/nvidia/bin" if triton else ""
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(brought))


@pytest.fixture(scope="module")
def functions(library):
    """Every kernel's machine instructions, {mangled name: SASS}."""
    tool = find_cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump")
    sass = subprocess.run([tool, "-sass", library], capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", sass, re.DOTALL))


def test_products_are_fp8_on_the_tensor_cores(functions):
    for kernel in TENSOR_CORE_KERNELS:
        instances = [sass for name, sass in functions.items() if kernel in name]
        assert instances, f"{kernel} is not in the library"
        assert all("QGMMA" in sass for sass in instances), kernel


def test_registers_suffice(functions):
    assert [name for name, sass in functions.items() if re.search(r"\b(LDL|STL)\b", sass)] == []


def test_rough_divisions_are_exact():
    """`quotient` of csrc/cuda/decode_router.cuh, with any error that PTX allows: 2 units in the last place."""
    rng = np.random.default_rng(0)
    divisor = np.concatenate([np.arange(1, 4097), rng.integers(1, 2**21, 100_000)])
    multiple = rng.integers(0, (2**21 - 1) // divisor + 1) * divisor
    for value in (multiple, np.maximum(multiple - 1, 0), np.full_like(divisor, 2**21 - 1)):
        exact = (value + 0.5) / divisor
        last_place = np.exp2(np.floor(np.log2(exact)) - 23)
        for error in (-2, 2):
            assert np.array_equal((exact + error * last_place).astype(np.int64), value // divisor)
