"""CUDA C++ kernels for Hopper, sm_90a (csrc/cuda).

Implements `misa_vllm.kernels.Kernels`. A row's heads and scores have the same bits whatever batch or tile it is in;
selected tokens are ascending (re-ranked ones in the order of the candidates), and of tokens with equal score the
earlier wins.
"""

import torch

from misa_vllm.index_cache import INDEX_HEAD_DIM, PAGE_TOKENS
from misa_vllm.kernels import triton
from misa_vllm.kernels.checks import Demands, IndexerChecks
from misa_vllm.kernels.extension import Extension
from misa_vllm.rows import QueryRows

MAX_DECODE_ROWS = 1024
"""What one launch of the decode selection takes."""
_DEMANDS = Demands("cuda", max_heads=64, query_alignment=16, page_alignment=16, contiguous_lists=True)
_NO_BOUND = 2**31 - 1
_MAX_POOLED_BYTES = 48 << 20
"""Above it the router pools each row's blocks anew (csrc/cuda/route_heads.cu)."""
_EXTENSION = Extension(
    "CUDA",
    "_cuda.so",
    traced=(
        "update_page_means", "route_heads", "decode_select", "decode_route_select", "prefill_select", "rerank_tokens",
    ),  # fmt: skip
    not_built=(
        "the CUDA extension was not built, install CUDA 12.8 or later and reinstall misa_vllm with MISA_BUILD_EXT=cuda"
    ),
)


def __getattr__(name: str):
    # the statistic mean_positive is an option that nothing is tuned for: Triton's, imported where it is asked for
    if name in ("update_signed_means", "route_heads_by_signs", "signs_workspace_bytes"):
        return getattr(triton, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def why_unavailable(device: torch.device) -> str | None:
    """Why these kernels cannot run on `device`, or None if they can."""
    if device.type != "cuda":
        return f"they run on cuda, not on {device.type}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"they are built for sm_90 (Hopper), this GPU is sm_{capability[0]}{capability[1]}"
    return _EXTENSION.failure


def address_rows(starts: torch.Tensor, lengths: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `misa_vllm.kernels.Kernels.address_rows`. Triton's: once a step, a few integers a token."""
    return triton.address_rows(starts, lengths, tokens)


def update_page_means(index_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """See `misa_vllm.kernels.Kernels.update_page_means`."""
    IndexerChecks("update_page_means", _DEMANDS).page_means(index_cache, slot_mapping)
    _EXTENSION.operators.update_page_means(index_cache, slot_mapping)


def route_heads(
    q: torch.Tensor, gates: torch.Tensor, index_cache: torch.Tensor, rows: QueryRows, active_heads: int, pool_block: int
) -> torch.Tensor:
    """See `misa_vllm.kernels.Kernels.route_heads`."""
    IndexerChecks("route_heads", _DEMANDS).route(q, gates, index_cache, rows, active_heads, pool_block)
    operators = _EXTENSION.operators
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
    return _EXTENSION.operators.prefill_workspace_bytes(max_visible)


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
    IndexerChecks("select_tokens", _DEMANDS).select(q, gates, heads, index_cache, rows, k, out)
    operators = _EXTENSION.operators
    visible_to = _NO_BOUND if visible_to is None else visible_to
    if _is_decode(rows):
        size = operators.decode_workspace_bytes(len(rows))
        workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
        operators.decode_select(
            q, gates, heads, index_cache, rows.block_table, rows.request, rows.visible, rows.max_visible, k, out,
            visible_from, visible_to, workspace,
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
    routed: torch.Tensor | None = None,
) -> None:
    """`select_tokens` by the heads of `route_heads`, in one launch where rows are few.

    `routed` [M, active_heads] int32 gets the heads of the rows that are scored, if they are few.
    """
    if not _is_decode(rows):
        heads = route_heads(q, gates, index_cache, rows, active_heads, pool_block)
        select_tokens(q, gates, heads, index_cache, rows, k, out, visible_from)
        return
    IndexerChecks("route_heads", _DEMANDS).route(q, gates, index_cache, rows, active_heads, pool_block)
    IndexerChecks("select_tokens", _DEMANDS).select(q, gates, None, index_cache, rows, k, out)
    size = _EXTENSION.operators.decode_route_workspace_bytes(len(rows), rows.max_visible)
    workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
    _EXTENSION.operators.decode_route_select(
        q, gates, index_cache, rows.block_table, rows.request, rows.visible, rows.max_visible, active_heads,
        pool_block, k, out, visible_from, workspace, routed,
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
    IndexerChecks("rerank_tokens", _DEMANDS).rerank(q, gates, candidates, index_cache, rows, k, out)
    _EXTENSION.operators.rerank_tokens(
        q, gates, candidates, index_cache, rows.block_table, rows.request, rows.visible, k, out,
        visible_from, _NO_BOUND if visible_to is None else visible_to,
    )  # fmt: skip


def workspace_bytes(max_rows: int, max_visible: int, k: int) -> int:
    """See `misa_vllm.kernels.Kernels.workspace_bytes`."""
    most_pooled = max_rows // 8 * (max_visible // PAGE_TOKENS) * (INDEX_HEAD_DIM * 2 + 4)
    decode = _EXTENSION.operators.decode_route_workspace_bytes(min(max_rows, MAX_DECODE_ROWS), max_visible)
    return prefill_workspace_bytes(max_visible) + max(min(most_pooled, _MAX_POOLED_BYTES), decode)
