"""CUDA C++ kernels for Hopper, sm_90a (csrc/cuda).

Implements `misa_vllm.kernels.Kernels`. Scores have the same bits whatever batch or tile a row is in; selected
tokens of prefill are ascending, and of tokens with equal score the earlier wins.
"""

import functools
from pathlib import Path

import torch

from misa_vllm.rows import QueryRows

LIBRARY = Path(__file__).resolve().parent.parent / "_cuda.so"
_NO_BOUND = 2**31 - 1


@functools.cache
def _load_failure() -> str | None:
    """Load the extension once; why it could not be loaded, or None."""
    if not LIBRARY.exists():
        return (
            "the CUDA extension was not built, install CUDA 12.8 or later and reinstall misa_vllm with"
            " MISA_BUILD_EXT=cuda"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load: {str(error).splitlines()[0]}"
    # all outputs are arguments, so under tracing there is nothing to make
    torch.library.register_fake("misa_vllm::prefill_select", lambda *args: None)
    return None


def why_unavailable(device: torch.device) -> str | None:
    """Why these kernels cannot run on `device`, or None if they can."""
    if device.type != "cuda":
        return f"they run on cuda, not on {device.type}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"they are built for sm_90 (Hopper), this GPU is sm_{capability[0]}{capability[1]}"
    return _load_failure()


def prefill_workspace_bytes(max_visible: int) -> int:
    """Bytes of workspace that prefill selection needs for any number of rows that see up to `max_visible` keys."""
    return torch.ops.misa_vllm.prefill_workspace_bytes(max_visible)


@functools.cache
def _prefill_workspace(device: torch.device, size: int) -> torch.Tensor:
    """One workspace per device: the calls of a stream follow each other, and its content is dead in between."""
    return torch.empty(size, dtype=torch.uint8, device=device)


def select_tokens(
    q: torch.Tensor,
    gates: torch.Tensor,
    heads: torch.Tensor | None,
    index_cache: torch.Tensor,
    rows: QueryRows,
    k: int,
    out: torch.Tensor,
    visible_from: int = 0,
    visible_to: int | None = None,
    workspace: torch.Tensor | None = None,
) -> None:
    """See `misa_vllm.kernels.Kernels.select_tokens`.

    `workspace` uint8 of at least `prefill_workspace_bytes(rows.max_visible)` bytes; None: one that this module
    keeps per device, for callers on one stream.
    """
    if workspace is None:
        workspace = _prefill_workspace(q.device, prefill_workspace_bytes(rows.max_visible))
    torch.ops.misa_vllm.prefill_select(
        q,
        gates,
        heads,
        index_cache,
        rows.block_table,
        rows.request,
        rows.visible,
        rows.max_visible,
        k,
        out,
        visible_from,
        _NO_BOUND if visible_to is None else visible_to,
        workspace,
    )
