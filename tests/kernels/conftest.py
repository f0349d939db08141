import importlib
import os
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from misa_vllm.kernels import IMPLEMENTATIONS

from .. import cuda_emulation

# Triton's interpreter runs on CPU tensors; without it Triton needs a GPU.
DEVICES = {
    "cpu": "cpu",
    "triton": "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda",
    "cuda": "cuda",
}


@dataclass(frozen=True)
class Subject:
    """An implementation under test."""

    name: str
    kernels: ModuleType
    device: str


@pytest.fixture(scope="session")
def emulated_cuda(tmp_path_factory) -> ModuleType:
    """The CUDA kernels on the CPU."""
    if cuda_emulation.find_compiler() is None:
        pytest.skip("emulated cuda kernels: no C++ compiler on Linux")
    return cuda_emulation.launchers(cuda_emulation.build(tmp_path_factory.mktemp("emulated")))


@pytest.fixture(params=[*DEVICES, "emulated cuda"], scope="session")
def subject(request) -> Subject:
    """Every implementation that runs on this machine; the others are skipped with their own reason."""
    if request.param == "emulated cuda":
        return Subject("cuda", request.getfixturevalue("emulated_cuda"), "cpu")
    name, device = request.param, DEVICES[request.param]
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{name} kernels: no GPU")
    try:
        kernels = importlib.import_module(IMPLEMENTATIONS[name])
    except ModuleNotFoundError as missing:
        if missing.name != IMPLEMENTATIONS[name]:
            raise
        pytest.skip(f"{name} kernels: not part of this checkout")
    reason = kernels.why_unavailable(torch.device(device))
    if reason is not None:
        pytest.skip(f"{name} kernels: {reason}")
    return Subject(name, kernels, device)


@pytest.fixture(scope="session")
def cpu_kernels() -> ModuleType:
    kernels = importlib.import_module(IMPLEMENTATIONS["cpu"])
    reason = kernels.why_unavailable(torch.device("cpu"))
    if reason is not None:
        pytest.skip(f"cpu kernels: {reason}")
    return kernels
