"""DSA's indexer: page means join the index cache, and scoring becomes ours."""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.deepseek_v2 import DeepseekV32IndexerCache
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend

from misa_vllm.index_cache import MEAN_BYTES, PAGE_BYTES, PAGE_TOKENS, STOCK_PAGE_BYTES
from misa_vllm.indexer import Indexer
from misa_vllm.log import info_once
from misa_vllm.seam import is_selected, settings_for


@functools.cache
def extend_indexer(cpu_storage: type[AttentionBackend]) -> None:
    """Give DSA's model code our index cache and our scoring; both act as stock unless the backend is selected.

    `cpu_storage` is the backend whose builder makes the index cache's metadata on CPU; on CUDA vLLM has one.
    """
    if current_platform.is_cpu():
        from misa_vllm.seam import cpu

        cpu.extend_generic_indexer(_make_index_cache_class(cpu_storage))
    else:
        from misa_vllm.seam import cuda

        cuda.extend_fused_indexer(_make_index_cache_class(cuda.IndexStorageWithRows, cuda.require_breaks))


def _make_index_cache_class(
    storage: type[AttentionBackend], check: Callable[[], None] = lambda: None
) -> type[DeepseekV32IndexerCache]:
    class IndexCacheWithMeans(DeepseekV32IndexerCache):
        """DSA's index-key cache whose pages end in the mean of their keys (`misa_vllm.index_cache`)."""

        def __init__(self, head_dim, dtype, prefix, cache_config):
            super().__init__(head_dim=head_dim, dtype=dtype, prefix=prefix, cache_config=cache_config)
            vllm_config = get_current_vllm_config()
            self.indexer = None
            self.index_cache = torch.empty(0, PAGE_BYTES, dtype=torch.uint8)
            if is_selected(vllm_config):
                check()
                self.indexer = Indexer(settings_for(vllm_config), vllm_config.device_config.device_type)

        def get_kv_cache_spec(self, vllm_config):
            spec = super().get_kv_cache_spec(vllm_config)
            if self.indexer is None or not self.indexer.settings.routes_heads:
                return spec
            return replace(spec, head_size=PAGE_BYTES // PAGE_TOKENS)

        def bind_kv_cache(self, kv_cache):
            """Take [num_pages, 1, 64, page_bytes / 64] and keep the page as bytes and the keys as stock sees them."""
            super().bind_kv_cache(kv_cache)
            if self.indexer is None:
                return
            pages = self.kv_cache
            if self.indexer.settings.routes_heads:
                info_once(
                    f"MISA page means take {len(pages) * MEAN_BYTES / 2**20:.1f} MiB per indexer layer: {MEAN_BYTES} "
                    f"bytes in each of {len(pages)} pages, {MEAN_BYTES / STOCK_PAGE_BYTES:.1%} of the index keys."
                )
            self.index_cache = pages.as_strided((pages.shape[0], pages.shape[1] * pages.shape[2]), (pages.stride(0), 1))
            stock_row = STOCK_PAGE_BYTES // PAGE_TOKENS
            self.kv_cache = pages.as_strided((pages.shape[0], PAGE_TOKENS, stock_row), (pages.stride(0), stock_row, 1))

        def get_attn_backend(self):
            return super().get_attn_backend() if self.indexer is None else storage

    return IndexCacheWithMeans
