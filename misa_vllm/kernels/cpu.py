"""C++ kernels for CPUs: AVX-512, AVX2 or plain vectors, on torch's thread pool (csrc/cpu).

Implements `misa_vllm.kernels.Kernels`, and `write_index_keys` and `sparse_mla_attention` as
`misa_vllm.reference` defines them. Rows are independent: a row's result has the same bits alone, in any batch
and with any number of threads. Selected tokens are ascending, and of tokens with equal score the earlier wins.
Transient memory is bounded by 64 MiB of scores plus the batch's widened queries and pooled keys.
"""

import functools
import sys
from pathlib import Path

import torch

from misa_vllm.index_cache import INDEX_HEAD_DIM, PAGE_BYTES, PAGE_TOKENS, STOCK_PAGE_BYTES
from misa_vllm.kernels.checks import TensorChecks
from misa_vllm.rows import QueryRows

LIBRARY = Path(__file__).resolve().parent.parent / "_cpu.so"
MAX_HEADS = 256
_NO_BOUND = 2**31
_OPERATORS = (
    "cpu_write_index_keys",
    "cpu_update_page_means",
    "cpu_route_heads",
    "cpu_select_tokens",
    "cpu_rerank_tokens",
    "cpu_sparse_mla_attention",
)


@functools.cache
def _load_failure() -> str | None:
    """Load the extension once; why it could not be loaded, or None."""
    if not LIBRARY.exists():
        return "the C++ extension was not built, install a C++ compiler and reinstall misa_vllm with MISA_BUILD_EXT=cpu"
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
    if device.type != "cpu":
        return f"they run on cpu, not on {device.type}"
    return _load_failure()


def _operators():
    failure = _load_failure()
    if failure is not None:
        raise RuntimeError(f"CPU kernels: {failure}")
    return torch.ops.misa_vllm


def _at_least(size: int) -> range:
    return range(size, sys.maxsize)


def _check_cache(check: TensorChecks, index_cache: torch.Tensor, page_bytes: int) -> None:
    check("index_cache", index_cache, ("pages", _at_least(page_bytes)), torch.uint8)
    aligned = index_cache.stride(0) % 4 == 0 and index_cache.data_ptr() % 4 == 0
    check.value("index_cache", aligned, "has pages that are not aligned to 4 bytes, as their float32 scales must be")


def _check_rows(check: TensorChecks, rows: QueryRows) -> None:
    check("rows.block_table", rows.block_table, ("R", "W"), torch.int32, contiguous_last=False)
    check("rows.request", rows.request, ("M",), torch.int32, contiguous_last=False)
    check("rows.visible", rows.visible, ("M",), torch.int32, contiguous_last=False)


def _check_queries(check: TensorChecks, q: torch.Tensor, gates: torch.Tensor) -> None:
    check("q", q, ("M", "H", INDEX_HEAD_DIM), torch.float8_e4m3fn)
    check("gates", gates, ("M", "H"), torch.float32)


def write_index_keys(k: torch.Tensor, index_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """See `misa_vllm.reference.write_index_keys`; k [T, 128] bfloat16 or float32, more rows than slots are ignored."""
    check = TensorChecks("write_index_keys", "cpu")
    check("slot_mapping", slot_mapping, ("T",), torch.int64, contiguous_last=False)
    check("k", k, (_at_least(slot_mapping.shape[0]), INDEX_HEAD_DIM), torch.bfloat16, torch.float32)
    _check_cache(check, index_cache, STOCK_PAGE_BYTES)
    _operators().cpu_write_index_keys(k, index_cache, slot_mapping)


def update_page_means(index_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """See `misa_vllm.kernels.Kernels.update_page_means`."""
    check = TensorChecks("update_page_means", "cpu")
    check("slot_mapping", slot_mapping, ("T",), torch.int64, contiguous_last=False)
    _check_cache(check, index_cache, PAGE_BYTES)
    _operators().cpu_update_page_means(index_cache, slot_mapping)


def route_heads(
    q: torch.Tensor, gates: torch.Tensor, index_cache: torch.Tensor, rows: QueryRows, active_heads: int, pool_block: int
) -> torch.Tensor:
    """See `misa_vllm.kernels.Kernels.route_heads`."""
    check = TensorChecks("route_heads", "cpu")
    _check_queries(check, q, gates)
    _check_cache(check, index_cache, PAGE_BYTES)
    _check_rows(check, rows)
    heads = q.shape[1]
    check.value("active_heads", 1 <= active_heads <= heads <= MAX_HEADS, f"{active_heads} is not in 1 .. {heads}")
    is_whole_pages = pool_block > 0 and pool_block % PAGE_TOKENS == 0
    check.value("pool_block", is_whole_pages, f"{pool_block} is not a positive multiple of {PAGE_TOKENS}")
    out = torch.empty(len(rows), active_heads, dtype=torch.int32)
    _operators().cpu_route_heads(
        q.view(torch.uint8), gates, index_cache, rows.block_table, rows.request, rows.visible, pool_block, out
    )
    return out


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
) -> None:
    """See `misa_vllm.kernels.Kernels.select_tokens`."""
    check = TensorChecks("select_tokens", "cpu")
    _check_queries(check, q, gates)
    if heads is not None:
        check("heads", heads, ("M", _at_least(1)), torch.int32, contiguous_last=False)
    _check_cache(check, index_cache, STOCK_PAGE_BYTES)
    _check_rows(check, rows)
    check.value("k", k >= 1, f"{k} is not positive")
    check("out", out, ("M", _at_least(k)), torch.int32, contiguous_last=False)
    _operators().cpu_select_tokens(
        q.view(torch.uint8), gates, heads, index_cache, rows.block_table, rows.request, rows.visible, k, out,
        visible_from, _NO_BOUND if visible_to is None else visible_to,
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
    check = TensorChecks("rerank_tokens", "cpu")
    _check_queries(check, q, gates)
    check("candidates", candidates, ("M", _at_least(k)), torch.int32, contiguous_last=False)
    _check_cache(check, index_cache, STOCK_PAGE_BYTES)
    _check_rows(check, rows)
    check.value("k", k >= 1, f"{k} is not positive")
    check("out", out, ("M", _at_least(k)), torch.int32, contiguous_last=False)
    _operators().cpu_rerank_tokens(
        q.view(torch.uint8), gates, candidates, index_cache, rows.block_table, rows.request, rows.visible, k, out,
        visible_from, _NO_BOUND if visible_to is None else visible_to,
    )  # fmt: skip


def sparse_mla_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    rows: QueryRows,
    tokens: torch.Tensor,
    scale: float,
    kv_lora_rank: int,
) -> torch.Tensor:
    """See `misa_vllm.reference.sparse_mla_attention`; q and kv_cache are bfloat16 or float32 each."""
    check = TensorChecks("sparse_mla_attention", "cpu")
    check("q", q, ("M", "heads", "width"), torch.bfloat16, torch.float32)
    check("kv_cache", kv_cache, ("pages", PAGE_TOKENS, "width"), torch.bfloat16, torch.float32)
    check("tokens", tokens, ("M", "k"), torch.int32, contiguous_last=False)
    _check_rows(check, rows)
    is_part = 1 <= kv_lora_rank <= q.shape[2]
    check.value("kv_lora_rank", is_part, f"{kv_lora_rank} is not in 1 .. {q.shape[2]}, the width of q")
    out = torch.empty(*q.shape[:2], kv_lora_rank, dtype=q.dtype)
    _operators().cpu_sparse_mla_attention(
        q, kv_cache, rows.block_table, rows.request, tokens, scale, kv_lora_rank, out
    )
    return out
