"""CUDA C++ kernels for Hopper, sm_90a (csrc/cuda).

Implements `misa_vllm.kernels.Kernels`. A row's heads and scores have the same bits whatever batch or tile it is in;
selected tokens are ascending (re-ranked ones in the order of the candidates), and of tokens with equal score the
earlier wins.
"""

import functools
import sys
from pathlib import Path

import torch

from misa_vllm.index_cache import INDEX_HEAD_DIM, PAGE_BYTES, PAGE_TOKENS, STOCK_PAGE_BYTES
from misa_vllm.kernels.checks import TensorChecks
from misa_vllm.rows import QueryRows

LIBRARY = Path(__file__).resolve().parent.parent / "_cuda.so"
MAX_HEADS = 64
MAX_DECODE_ROWS = 1024
"""What one launch of the decode selection takes."""
_NO_BOUND = 2**31 - 1
_MAX_POOLED_BYTES = 48 << 20
"""Above it the router pools each row's blocks anew (csrc/cuda/route_heads.cu)."""
_OPERATORS = ("update_page_means", "route_heads", "decode_select", "prefill_select", "rerank_tokens")


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
    for name in _OPERATORS:
        # all outputs are arguments, so under tracing there is nothing to make
        torch.library.register_fake(f"misa_vllm::{name}", lambda *args: None)
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


def _operators():
    failure = _load_failure()
    if failure is not None:
        raise RuntimeError(f"CUDA kernels: {failure}")
    return torch.ops.misa_vllm


def _at_least(size: int) -> range:
    return range(size, sys.maxsize)


def _check_cache(check: TensorChecks, index_cache: torch.Tensor, page_bytes: int) -> None:
    check("index_cache", index_cache, ("pages", _at_least(page_bytes)), torch.uint8)
    aligned = index_cache.stride(0) % 16 == 0 and index_cache.data_ptr() % 16 == 0
    check.value("index_cache", aligned, "has pages that do not start at multiples of 16 bytes")


def _check_rows(check: TensorChecks, rows: QueryRows) -> None:
    check("rows.block_table", rows.block_table, ("R", "W"), torch.int32)
    check("rows.request", rows.request, ("M",), torch.int32)
    check("rows.visible", rows.visible, ("M",), torch.int32)


def _check_queries(check: TensorChecks, q: torch.Tensor, gates: torch.Tensor) -> None:
    check("q", q, ("M", "H", INDEX_HEAD_DIM), torch.float8_e4m3fn)
    aligned = q.stride(0) % 16 == 0 and q.stride(1) % 16 == 0 and q.data_ptr() % 16 == 0
    check.value("q", aligned, "has heads that do not start at multiples of 16 bytes")
    check("gates", gates, ("M", "H"), torch.float32)
    check.value("q", 1 <= q.shape[1] <= MAX_HEADS, f"has {q.shape[1]} heads, expected 1 .. {MAX_HEADS}")


def update_page_means(index_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """See `misa_vllm.kernels.Kernels.update_page_means`."""
    check = TensorChecks("update_page_means", "cuda")
    check("slot_mapping", slot_mapping, ("T",), torch.int64)
    _check_cache(check, index_cache, PAGE_BYTES)
    _operators().update_page_means(index_cache, slot_mapping)


def route_heads(
    q: torch.Tensor, gates: torch.Tensor, index_cache: torch.Tensor, rows: QueryRows, active_heads: int, pool_block: int
) -> torch.Tensor:
    """See `misa_vllm.kernels.Kernels.route_heads`."""
    check = TensorChecks("route_heads", "cuda")
    _check_queries(check, q, gates)
    _check_cache(check, index_cache, PAGE_BYTES)
    _check_rows(check, rows)
    heads = q.shape[1]
    check.value("active_heads", 1 <= active_heads <= heads, f"{active_heads} is not in 1 .. {heads}")
    is_whole_pages = pool_block > 0 and pool_block % PAGE_TOKENS == 0
    check.value("pool_block", is_whole_pages, f"{pool_block} is not a positive multiple of {PAGE_TOKENS}")
    operators = _operators()
    size = operators.route_heads_workspace(len(rows), rows.block_table.shape[0], rows.max_visible, pool_block)
    workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
    out = torch.empty(len(rows), active_heads, dtype=torch.int32, device=q.device)
    operators.route_heads(
        q, gates, index_cache, rows.block_table, rows.request, rows.visible, rows.max_visible, pool_block,
        workspace, out,
    )  # fmt: skip
    return out


def prefill_workspace_bytes(max_visible: int) -> int:
    """Bytes of workspace that prefill selection needs for any number of rows that see up to `max_visible` keys."""
    return _operators().prefill_workspace_bytes(max_visible)


def _is_decode(rows: QueryRows) -> bool:
    """Whether rows are too few per request to share the reading of its keys."""
    return len(rows) <= MAX_DECODE_ROWS and (len(rows) < 64 or len(rows) < 8 * rows.block_table.shape[0])


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

    `workspace` uint8, for prefill, of at least `prefill_workspace_bytes(rows.max_visible)` bytes; None: one is
    allocated.
    """
    check = TensorChecks("select_tokens", "cuda")
    _check_queries(check, q, gates)
    if heads is not None:
        check("heads", heads, ("M", _at_least(1)), torch.int32)
    _check_cache(check, index_cache, STOCK_PAGE_BYTES)
    _check_rows(check, rows)
    check.value("k", k >= 1, f"{k} is not positive")
    check("out", out, ("M", _at_least(k)), torch.int32)
    operators = _operators()
    visible_to = _NO_BOUND if visible_to is None else visible_to
    if _is_decode(rows):
        size = operators.decode_workspace_bytes(len(rows))
        workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
        operators.decode_select(
            q, gates, heads, index_cache, rows.block_table, rows.request, rows.visible, rows.max_visible, k, out,
            visible_from, visible_to, workspace, False,
        )  # fmt: skip
        return
    if workspace is None:
        size = operators.prefill_workspace_bytes(rows.max_visible)
        workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
    operators.prefill_select(
        q, gates, heads, index_cache, rows.block_table, rows.request, rows.visible, rows.max_visible, k, out,
        visible_from, visible_to, workspace,
    )  # fmt: skip


def route_and_select(
    q: torch.Tensor,
    gates: torch.Tensor,
    index_cache: torch.Tensor,
    rows: QueryRows,
    active_heads: int,
    pool_block: int,
    k: int,
    out: torch.Tensor,
    visible_from: int = 0,
) -> None:
    """`select_tokens` by the heads of `route_heads`.

    For few rows the selection starts while heads are still being routed, and reads its first keys meanwhile.
    """
    if not _is_decode(rows) or len(rows) == 0:
        heads = route_heads(q, gates, index_cache, rows, active_heads, pool_block)
        select_tokens(q, gates, heads, index_cache, rows, k, out, visible_from)
        return
    check = TensorChecks("route_and_select", "cuda")
    _check_queries(check, q, gates)
    _check_cache(check, index_cache, PAGE_BYTES)
    _check_rows(check, rows)
    check.value("active_heads", 1 <= active_heads <= q.shape[1], f"{active_heads} is not in 1 .. {q.shape[1]}")
    is_whole_pages = pool_block > 0 and pool_block % PAGE_TOKENS == 0
    check.value("pool_block", is_whole_pages, f"{pool_block} is not a positive multiple of {PAGE_TOKENS}")
    check.value("k", k >= 1, f"{k} is not positive")
    check("out", out, ("M", _at_least(k)), torch.int32)
    operators = _operators()
    # Both launches' memory is taken first, so that neither lies where the other's was: they run at the same time.
    heads = torch.empty(len(rows), active_heads, dtype=torch.int32, device=q.device)
    size = operators.decode_workspace_bytes(len(rows))
    workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
    operators.route_heads(
        q, gates, index_cache, rows.block_table, rows.request, rows.visible, rows.max_visible, pool_block,
        workspace[:0], heads,
    )  # fmt: skip
    operators.decode_select(
        q, gates, heads, index_cache, rows.block_table, rows.request, rows.visible, rows.max_visible, k, out,
        visible_from, _NO_BOUND, workspace, True,
    )  # fmt: skip


def rerank_tokens(
    q: torch.Tensor,
    gates: torch.Tensor,
    candidates: torch.Tensor,
    index_cache: torch.Tensor,
    rows: QueryRows,
    k: int,
    out: torch.Tensor,
    visible_from: int = 0,
    visible_to: int | None = None,
) -> None:
    """See `misa_vllm.kernels.Kernels.rerank_tokens`."""
    check = TensorChecks("rerank_tokens", "cuda")
    _check_queries(check, q, gates)
    check("candidates", candidates, ("M", _at_least(k)), torch.int32)
    _check_cache(check, index_cache, STOCK_PAGE_BYTES)
    _check_rows(check, rows)
    check.value("k", k >= 1, f"{k} is not positive")
    check("out", out, ("M", _at_least(k)), torch.int32)
    _operators().rerank_tokens(
        q, gates, candidates, index_cache, rows.block_table, rows.request, rows.visible, k, out,
        visible_from, _NO_BOUND if visible_to is None else visible_to,
    )  # fmt: skip


def workspace_bytes(max_rows: int, max_visible: int, k: int) -> int:
    """See `misa_vllm.kernels.Kernels.workspace_bytes`."""
    most_pooled = max_rows // 8 * (max_visible // PAGE_TOKENS) * (INDEX_HEAD_DIM * 2 + 4)
    decode = _operators().decode_workspace_bytes(min(max_rows, MAX_DECODE_ROWS))
    return prefill_workspace_bytes(max_visible) + max(min(most_pooled, _MAX_POOLED_BYTES), decode)
