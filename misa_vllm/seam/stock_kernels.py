"""Stock vLLM's indexer kernels, to measure against."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from misa_vllm.index_cache import PAGE_TOKENS


@dataclass(frozen=True)
class StockIndexerKernels:
    """The kernels that vLLM's `sparse_attn_indexer` launches on CUDA with FP8 keys, called as it calls them.

    M rows, H heads, N keys, R requests; q float8_e4m3fn [M, H, 128], gates float32 [M, H] (the query's scale is in
    them), kv_cache uint8 [pages, 64, 132], block_table int32 [R, W], out int32 [M, k].
    """

    gather_keys: Callable[..., None]
    """(kv_cache, keys, scales, block_table, starts): pages to keys float8_e4m3fn [N, 128] and scales uint8 [N, 4];
    starts int32 [R + 1]. Prefill scores read what it wrote."""
    prefill_scores: Callable[..., torch.Tensor]
    """(q, keys, scales, gates, first, end) -> float32 [M, N]; row m scores the keys first[m] .. end[m] - 1, int32,
    and leaves the others as they are."""
    prefill_select: Callable[..., None]
    """(scores, first, end, out, k)."""
    decode_schedule: Callable[[torch.Tensor], torch.Tensor]
    """visible int32 [R, M / R] -> the plan that `decode_scores` takes; vLLM makes it once a step."""
    decode_scores: Callable[..., torch.Tensor]
    """(q, kv_cache, gates, visible, block_table, schedule, max_model_len) -> float32 [M, max_model_len]."""
    decode_select: Callable[..., None]
    """(scores, visible, out, k, max_visible), by the kernel that vLLM picks for this number of rows."""
    decode_select_name: Callable[[torch.Tensor, int], str]
    """(scores, k) -> which kernel that is."""


def stock_indexer_kernels(device: torch.device) -> StockIndexerKernels:
    """Stock vLLM's indexer kernels for `device`, outside of an engine.

    Raises:
        RuntimeError: they do not run here; one line that says why.
    """
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.indexer_topk import get_indexer_topk
    from vllm.platforms import current_platform
    from vllm.utils.deep_gemm import (
        fp8_fp4_mqa_logits,
        fp8_fp4_paged_mqa_logits,
        get_paged_mqa_logits_metadata,
        is_deep_gemm_supported,
    )
    from vllm.utils.platform_utils import num_compute_units
    from vllm.v1.worker.workspace import init_workspace_manager, is_workspace_manager_initialized

    if not current_platform.is_cuda() or not is_deep_gemm_supported():
        raise RuntimeError(
            "stock vLLM's indexer needs CUDA and DeepGEMM on a Hopper or Blackwell GPU, with VLLM_USE_DEEP_GEMM=1"
        )
    if not is_workspace_manager_initialized():  # the engine's model runner does this
        init_workspace_manager(device)
    multiprocessors = num_compute_units(device.index or 0)
    select = get_indexer_topk("auto")

    def prefill_scores(q, keys, scales, gates, first, end):
        scales = scales.view(torch.float32).squeeze(-1)
        return fp8_fp4_mqa_logits((q, None), (keys, scales), gates, first, end, clean_logits=False)

    def prefill_select(scores, first, end, out, k):
        ops.top_k_per_row_prefill(scores, first, end, out, scores.shape[0], scores.stride(0), scores.stride(1), k)

    def decode_scores(q, kv_cache, gates, visible, block_table, schedule, max_model_len):
        return fp8_fp4_paged_mqa_logits(
            (q.unflatten(0, visible.shape), None), kv_cache.unsqueeze(-2), gates, visible, block_table, schedule,
            max_model_len=max_model_len, clean_logits=False,
        )  # fmt: skip

    return StockIndexerKernels(
        gather_keys=ops.cp_gather_indexer_k_quant_cache,
        prefill_scores=prefill_scores,
        prefill_select=prefill_select,
        decode_schedule=lambda visible: get_paged_mqa_logits_metadata(visible, PAGE_TOKENS, multiprocessors),
        decode_scores=decode_scores,
        decode_select=lambda scores, visible, out, k, most: select(scores, visible, visible.shape[1], out, k, most),
        decode_select_name=lambda scores, k: select.resolve_backend(scores, k, scores.shape[0]),
    )
