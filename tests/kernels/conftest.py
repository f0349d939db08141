import importlib
import os
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from misa_vllm.kernels import IMPLEMENTATIONS

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


@pytest.fixture(params=DEVICES, scope="session")
def subject(request) -> Subject:
    """Every implementation that runs on this machine; the others are skipped with their own reason."""
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
