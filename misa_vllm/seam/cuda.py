"""The indexer of vLLM's fused DSA path on CUDA, `vllm.models.deepseek_v32`."""

import functools

import numpy as np
import torch
from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.sparse_attn_indexer import PrefillRowShard, _reserve_row_shard_exchange_transient
from vllm.models.deepseek_v32 import attention
from vllm.v1.attention.backends.mla.indexer import DeepseekV32IndexerBackend, DeepseekV32IndexerMetadataBuilder

from misa_vllm import metrics
from misa_vllm.kernels import Kernels
from misa_vllm.rows import QueryRows
from misa_vllm.seam import settings_for


class MetadataBuilderWithRows(DeepseekV32IndexerMetadataBuilder):
    """Stock's metadata with what our kernels address rows by."""

    counts_queries = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.settings = settings_for(self.vllm_config)

    def build_for_cudagraph_capture(self, common_attn_metadata):
        self.counts_queries = False  # nobody asked these
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)
        finally:
            self.counts_queries = True

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.query_start_loc = common_attn_metadata.query_start_loc
        starts = common_attn_metadata.query_start_loc_cpu.numpy()
        last = common_attn_metadata.seq_lens_cpu_upper_bound[: len(starts) - 1].numpy()
        first = last - (starts[1:] - starts[:-1]) + 1
        # exact on the host for prefills only: a speculative decode's length is known on the device
        only_prefills = metadata.num_decodes == 0 and metadata.num_prefills > 0
        metadata.min_visible = int(first.min()) if only_prefills else 0
        if self.counts_queries:
            metrics.count_queries(self.settings, first, last, np.arange(len(last)) < metadata.num_decodes)
        return metadata


class IndexStorageWithRows(DeepseekV32IndexerBackend):
    """Stock's storage of the index keys with our metadata."""

    @staticmethod
    def get_builder_cls():
        return MetadataBuilderWithRows


def _query_rows(forward_context, metadata, kernels: Kernels, max_model_len: int):
    """`QueryRows` of a step on CUDA, computed by its first layer and shared by the others.

    They live as long as the forward context, of which each step has its own, and so has each pass of a draft model,
    whose passes share one metadata object that the graph itself advances. In a captured graph the launch is part of
    the graph: lengths are read on the device, and what the host knows of them is used only where nothing is being
    captured.
    """
    cache = forward_context.__dict__.setdefault("misa_rows", {})
    if id(metadata) not in cache:
        request, visible = kernels.address_rows(
            metadata.query_start_loc, metadata.seq_lens, len(metadata.slot_mapping)
        )
        capturing = torch.cuda.is_current_stream_capturing()
        cache[id(metadata)] = QueryRows(
            block_table=metadata.block_table,
            request=request,
            visible=visible,
            max_visible=max_model_len if capturing else metadata.max_seq_len,
            min_visible=0 if capturing else metadata.min_visible,
        )
    return cache[id(metadata)]


def _scoring_is_skipped(forward_context, dense_mha_layer: str) -> bool:
    """Stock's test for a step whose attention is dense (every context fits in top-k) and reads no selection."""
    if forward_context.cudagraph_runtime_mode == CUDAGraphMode.FULL or not dense_mha_layer:
        return False
    mla = forward_context.attn_metadata.get(dense_mha_layer)
    return (
        getattr(getattr(mla, "prefill", None), "use_dense_mha", False)
        and getattr(mla, "num_decode_tokens", -1) == 0
        and not torch.cuda.is_current_stream_capturing()
    )


def require_breaks() -> None:
    """Raise RuntimeError if vLLM's module was imported too early for the breaks it needs in captured graphs.

    Its decorator would have done nothing, and graphs of prefills would be captured with one step's lengths in them.
    """
    breaks = hasattr(attention.DeepseekV32Attention._sparse_indexer_and_attn, "__wrapped__")
    if is_breakable_cudagraph_enabled() and not breaks:
        raise RuntimeError(
            "vllm.models.deepseek_v32 was imported before VLLM_USE_BREAKABLE_CUDAGRAPH was set: "
            "set it to 1 in the environment, or import the module later"
        )


def extend_fused_indexer(index_cache_class: type) -> None:
    """Rebind the index cache's class and the scoring function in `vllm.models.deepseek_v32`."""
    attention.DeepseekV32Indexer.indexer_cache_cls = index_cache_class
    stock = attention.sparse_attn_indexer

    @functools.wraps(stock)
    def sparse_attn_indexer(
        hidden_states, k_cache_prefix, kv_cache, q_quant, q_scale, k, weights, *args, **kwargs
    ):
        forward_context = get_forward_context()
        cache = forward_context.no_compile_layers[k_cache_prefix]
        indexer = cache.indexer
        topk_indices_buffer, max_model_len = args[6], args[4]
        profiling = not isinstance(forward_context.attn_metadata, dict)

        def select_as_stock():
            selected = stock(hidden_states, k_cache_prefix, kv_cache, q_quant, q_scale, k, weights, *args, **kwargs)
            if indexer is not None and indexer.observer and not profiling:
                metadata = forward_context.attn_metadata[k_cache_prefix]
                rows = _query_rows(forward_context, metadata, indexer.kernels, max_model_len)
                part = slice(0, len(rows))
                indexer.observe(q_quant[part], weights[part], cache.index_cache, rows, topk_indices_buffer[part])
            return selected

        if indexer is None or not indexer.settings.routes_heads:
            return select_as_stock()
        exact_decode = indexer.settings.exact_decode
        if profiling:
            indexer.reserve(topk_indices_buffer.shape[0], max_model_len, hidden_states.device)
            if exact_decode:
                return select_as_stock()  # reserves as much for the decode steps, and what follows
            _reserve_row_shard_exchange_transient(topk_indices_buffer, hidden_states.device)
            return topk_indices_buffer
        metadata = forward_context.attn_metadata[k_cache_prefix]
        # Keys were written before this call, so statistics come first, whatever else is skipped.
        indexer.update_statistics(cache.index_cache, metadata.slot_mapping)
        if exact_decode and metadata.num_prefills == 0:
            return select_as_stock()
        if _scoring_is_skipped(forward_context, kwargs["dense_mha_metadata_layer_name"]):
            return topk_indices_buffer
        rows = _query_rows(forward_context, metadata, indexer.kernels, max_model_len)

        def select(start: int, stop: int, exact: bool = False) -> None:
            if stop > start:
                part = slice(start, stop)
                out = topk_indices_buffer[part]
                indexer.select(q_quant[part], weights[part], cache.index_cache, rows[part], out, exact)

        shard = None
        if metadata.prefill:
            shard = PrefillRowShard.from_metadata(metadata.prefill, metadata.num_decode_tokens)
        decoded = metadata.num_decode_tokens
        if shard is None and not exact_decode:
            select(0, len(rows))
            return topk_indices_buffer
        select(0, decoded, exact_decode)
        if shard is None:
            select(decoded, len(rows))
        else:
            # each tensor-parallel rank selects its share of the prefill rows, then the ranks exchange them
            select(shard.start, shard.stop)
            shard.exchange_topk(topk_indices_buffer, indexer.settings.topk)
        return topk_indices_buffer

    # The only place the fused path looks scoring up. It runs inside an eager break of vLLM's graph capture
    # already, so it needs no decorator of its own.
    attention.sparse_attn_indexer = sparse_attn_indexer
