"""setup.py's switch MISA_BUILD_EXT and its messages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    not (REPOSITORY / "setup.py").exists(), reason="the tests run outside of the source tree"
)


@pytest.fixture
def build(tmp_path):
    """Builds in an empty folder; the given variables are set. Returns (exit status, output, built names)."""
    pytest.importorskip("setuptools", minversion="77")
    shutil.copy(REPOSITORY / "setup.py", tmp_path)
    # a translation unit of its own keeps this to the build logic: compiling the kernels takes minutes
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    (tmp_path / "csrc/cpu/one.cpp").write_text("int one() { return 1; }\n")
    (tmp_path / "csrc/cpu/one.h").write_text("")

    def run(**variables):
        finished = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--build-lib", "built"],
            cwd=tmp_path, env={**os.environ, **variables}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        output = finished.stdout + finished.stderr
        return finished.returncode, output, sorted(path.name for path in tmp_path.glob("built/misa_vllm/*.so"))

    return run


def ours(output):
    return [line for line in output.splitlines() if line.startswith(("misa_vllm: ", "MISA_BUILD_EXT"))]


def test_none_builds_nothing(build):
    assert build(MISA_BUILD_EXT="none")[::2] == (0, [])


def test_an_unknown_choice(build):
    status, output, built = build(MISA_BUILD_EXT="gpu")
    assert status != 0 and built == []
    assert ours(output) == ["MISA_BUILD_EXT=gpu: choose auto, none, cpu, cuda, all, or a list such as cpu,cuda"]


def test_no_compiler(build):
    status, output, built = build(MISA_BUILD_EXT="auto", CXX="/no/such/compiler")
    message = "no C++ compiler was found (/no/such/compiler), install g++ or set CXX"
    assert (status, built) == (0, [])
    assert ours(output) == [f"misa_vllm: installing without the cpu extension: {message}"]
    status, output, built = build(MISA_BUILD_EXT="cpu", CXX="/no/such/compiler")
    assert status != 0 and built == []
    assert ours(output) == [f"misa_vllm: the cpu extension cannot be built: {message}"]


def test_a_compiler_that_fails(build):
    status, output, built = build(MISA_BUILD_EXT="cpu", CXX="false")
    assert status != 0 and built == []
    assert len(ours(output)) == 1 and "false failed" in ours(output)[0]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_builds_the_cpu_extension(build):
    status, output, built = build(MISA_BUILD_EXT="cpu")
    assert (status, built) == (0, ["_cpu.so"]), output


def test_cuda_without_sources(build):
    status, output, built = build(MISA_BUILD_EXT="cuda")
    assert status != 0 and built == []
    assert ours(output) == ["misa_vllm: the cuda extension cannot be built: there is no source file in csrc/cuda"]
