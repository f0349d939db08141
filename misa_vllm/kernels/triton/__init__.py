"""The `misa_vllm.kernels.Kernels` contract in Triton: NVIDIA GPUs from sm_80 on, Hopper first.

GPUs with FP8 matrix units (sm_89 and later) multiply the FP8 values directly; sm_80 and Triton's interpreter
decode them to fp16, in which every e4m3 value is exact (`fp8.py`).
"""

import importlib
import importlib.util

import torch

_OPERATIONS = {
    "address_rows": "address",
    "update_page_means": "page_means",
    "route_heads": "route",
    "update_signed_means": "page_means",
    "route_heads_by_signs": "signed_means",
    "signs_workspace_bytes": "signed_means",
    "select_tokens": "select",
    "rerank_tokens": "rerank",
    "workspace_bytes": "select",
}


def __getattr__(name: str):
    # late, because asking `why_unavailable` must work, and be quick, where Triton is not installed
    if name not in _OPERATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_OPERATIONS[name]}"), name)


def why_unavailable(device: torch.device) -> str | None:
    """One line that says why these kernels cannot run on `device`, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda":
        from triton import knobs

        return None if knobs.runtime.interpret else "Triton needs a GPU (or TRITON_INTERPRET=1)"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels need an NVIDIA GPU of compute capability 8.0 or later"
    return None
