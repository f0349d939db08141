"""C++ kernels for CPUs: AVX-512, AVX2 or plain vectors, on torch's thread pool (csrc/cpu).

Implements `misa_vllm.kernels.Kernels`, and `write_index_keys` and `sparse_mla_attention` as
`misa_vllm.reference` defines them. Rows are independent: a row's result has the same bits alone, in any batch
and with any number of threads. Selected tokens are ascending, and of tokens with equal score the earlier wins.
Transient memory is bounded by 64 MiB of scores plus the batch's widened queries and pooled keys.
"""

import torch

from misa_vllm.index_cache import INDEX_HEAD_DIM, PAGE_TOKENS, STOCK_PAGE_BYTES
from misa_vllm.kernels.checks import Demands, IndexerChecks, at_least
from misa_vllm.kernels.extension import Extension
from misa_vllm.reference import address_rows as address_rows  # a few integers a token
from misa_vllm.rows import QueryRows

_DEMANDS = Demands("cpu", max_heads=256, query_alignment=1, page_alignment=4, contiguous_lists=False)
_NO_BOUND = 2**31
_EXTENSION = Extension(
    "CPU",
    "_cpu.so",
    traced=(
        "cpu_write_index_keys",
        "cpu_update_page_means",
        "cpu_route_heads",
        "cpu_update_signed_means",
        "cpu_route_heads_by_signs",
        "cpu_select_tokens",
        "cpu_rerank_tokens",
        "cpu_sparse_mla_attention",
    ),
    not_built=(
        "the C++ extension was not built, install a C++ compiler and reinstall misa_vllm with MISA_BUILD_EXT=cpu"
    ),
)


def why_unavailable(device: torch.device) -> str | None:
    """Why these kernels cannot run on `device`, or None if they can."""
    if device.type != "cpu":
        return f"they run on cpu, not on {device.type}"
    return _EXTENSION.failure


def write_index_keys(k: torch.Tensor, index_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """See `misa_vllm.reference.write_index_keys`; k [T, 128] bfloat16 or float32, more rows than slots are ignored."""
    check = IndexerChecks("write_index_keys", _DEMANDS)
    check.numbers("slot_mapping", slot_mapping, ("T",), torch.int64)
    check("k", k, (at_least(slot_mapping.shape[0]), INDEX_HEAD_DIM), torch.bfloat16, torch.float32)
    check.cache(index_cache, STOCK_PAGE_BYTES)
    _EXTENSION.operators.cpu_write_index_keys(k, index_cache, slot_mapping)


def update_page_means(index_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """See `misa_vllm.kernels.Kernels.update_page_means`."""
    IndexerChecks("update_page_means", _DEMANDS).page_means(index_cache, slot_mapping)
    _EXTENSION.operators.cpu_update_page_means(index_cache, slot_mapping)


def _route(name: str, q, gates, index_cache, rows, active_heads: int, pool_block: int) -> torch.Tensor:
    """By the operator cpu_NAME; arguments and result as in `misa_vllm.kernels.Kernels.route_heads`."""
    IndexerChecks(name, _DEMANDS).route(q, gates, index_cache, rows, active_heads, pool_block)
    out = torch.empty(len(rows), active_heads, dtype=torch.int32)
    getattr(_EXTENSION.operators, f"cpu_{name}")(
        q.view(torch.uint8), gates, index_cache, rows.block_table, rows.request, rows.visible, pool_block, out
    )
    return out


def route_heads(
    q: torch.Tensor, gates: torch.Tensor, index_cache: torch.Tensor, rows: QueryRows, active_heads: int, pool_block: int
) -> torch.Tensor:
    """See `misa_vllm.kernels.Kernels.route_heads`."""
    return _route("route_heads", q, gates, index_cache, rows, active_heads, pool_block)


def update_signed_means(index_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """See `misa_vllm.kernels.Kernels.update_signed_means`."""
    IndexerChecks("update_signed_means", _DEMANDS).page_means(index_cache, slot_mapping)
    _EXTENSION.operators.cpu_update_signed_means(index_cache, slot_mapping)


def route_heads_by_signs(
    q: torch.Tensor, gates: torch.Tensor, index_cache: torch.Tensor, rows: QueryRows, active_heads: int, pool_block: int
) -> torch.Tensor:
    """See `misa_vllm.kernels.Kernels.route_heads_by_signs`."""
    return _route("route_heads_by_signs", q, gates, index_cache, rows, active_heads, pool_block)


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
    IndexerChecks("select_tokens", _DEMANDS).select(q, gates, heads, index_cache, rows, k, out)
    _EXTENSION.operators.cpu_select_tokens(
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
    IndexerChecks("rerank_tokens", _DEMANDS).rerank(q, gates, candidates, index_cache, rows, k, out)
    _EXTENSION.operators.cpu_rerank_tokens(
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
    check = IndexerChecks("sparse_mla_attention", _DEMANDS)
    check("q", q, ("M", "heads", "width"), torch.bfloat16, torch.float32)
    check("kv_cache", kv_cache, ("pages", PAGE_TOKENS, "width"), torch.bfloat16, torch.float32)
    check.numbers("tokens", tokens, ("M", "k"))
    check.rows(rows)
    is_part = 1 <= kv_lora_rank <= q.shape[2]
    check.value("kv_lora_rank", is_part, f"{kv_lora_rank} is not in 1 .. {q.shape[2]}, the width of q")
    out = torch.empty(*q.shape[:2], kv_lora_rank, dtype=q.dtype)
    _EXTENSION.operators.cpu_sparse_mla_attention(
        q, kv_cache, rows.block_table, rows.request, tokens, scale, kv_lora_rank, out
    )
    return out
