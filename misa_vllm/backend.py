"""`--attention-backend misa`.

From here to a kernel: this module -> `misa_vllm.indexer.Indexer.select` -> a policy in `misa_vllm.policies`
-> `misa_vllm.kernels` (which names the module of each implementation).

On CUDA sparse MLA attention itself stays stock vLLM's: `MISABackend` stands for the implementation vLLM would
pick for the same model, dtype and GPU. On CPU, where vLLM has none, `SparseMLAImpl` computes it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MLAAttentionImpl,
)

from misa_vllm import metrics
from misa_vllm.index_cache import PAGE_TOKENS
from misa_vllm.kernels import choose_kernels
from misa_vllm.rows import QueryRows
from misa_vllm.seam import BACKEND_NAME, settings_for
from misa_vllm.seam.platform import stock_sparse_mla_backend


@dataclass
class MISAMetadata(AttentionMetadata):
    """One step on CPU, shared by the MLA layers and their index caches."""

    num_actual_tokens: int
    rows: QueryRows
    slot_mapping: torch.Tensor
    """[T] int64, page * 64 + offset; negative for padding."""
    exact: torch.Tensor | None
    """[T] bool, the rows that select exactly whatever the policy (decoded ones under `exact_decode`); None: none."""
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int = 0
    prefill = None
    decode = None


class MISAMetadataBuilder(AttentionMetadataBuilder[MISAMetadata]):
    """Builds the CPU engine's metadata. Every query goes through the same sparse path, so none is "prefill"."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.settings = settings_for(vllm_config)
        self.kernels = choose_kernels("cpu")
        self.longest_decode = 1 + vllm_config.num_speculative_tokens

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> MISAMetadata:
        common = common_attn_metadata
        tokens = common.num_actual_tokens
        query_lens = common.query_start_loc_cpu[1:] - common.query_start_loc_cpu[:-1]
        lengths = common.seq_lens[: len(query_lens)]
        request, visible = self.kernels.address_rows(common.query_start_loc_cpu, lengths, tokens)
        rows = QueryRows(
            block_table=common.block_table_tensor,
            request=request,
            visible=visible,
            max_visible=int(visible.max()) if len(visible) else 0,
            min_visible=int(visible.min()) if len(visible) else 0,
        )
        last = lengths.numpy()
        decoding = query_lens <= self.longest_decode
        metrics.count_queries(self.settings, last - query_lens.numpy() + 1, last, decoding.numpy())
        exact = decoding.repeat_interleave(query_lens) if self.settings.exact_decode and decoding.any() else None
        return MISAMetadata(
            num_actual_tokens=tokens,
            rows=rows,
            slot_mapping=common.slot_mapping[:tokens],
            exact=exact,
            num_decodes=common.num_reqs,
            num_decode_tokens=tokens,
        )


class _PagedBackend(AttentionBackend):
    """What the CPU engine's caches have in common: our metadata, and pages of 64 tokens."""

    @staticmethod
    def get_builder_cls() -> type[MISAMetadataBuilder]:
        return MISAMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int]:
        return [PAGE_TOKENS]


class MISABackend(_PagedBackend):
    """The attention backend that vLLM's option `misa` names.

    On CUDA vLLM asks `validate_configuration`, then resolves `full_cls_name`: both answer for the stock backend.
    """

    _stock: ClassVar[type[AttentionBackend] | None] = None

    supported_dtypes = [torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes = ["auto", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type["SparseMLAImpl"]:
        return SparseMLAImpl

    @classmethod
    def is_mla(cls) -> bool:
        return True

    @classmethod
    def is_sparse(cls) -> bool:
        return True

    @classmethod
    def validate_configuration(cls, *, device_capability, **selector_fields) -> list[str]:
        """Reasons why this layer cannot be served, none if a stock backend can."""
        cls._stock, reasons = stock_sparse_mla_backend(device_capability, **selector_fields)
        return reasons

    @classmethod
    def full_cls_name(cls) -> tuple[str, str]:
        return super().full_cls_name() if cls._stock is None else cls._stock.full_cls_name()


class MISAIndexerBackend(_PagedBackend):
    """Storage of the index keys on CPU; its layers never attend."""

    @staticmethod
    def get_name() -> str:
        return "MISA_INDEXER"

    @staticmethod
    def get_impl_cls():
        raise NotImplementedError("the index cache has no attention implementation")


class SparseMLAImpl(MLAAttentionImpl[MISAMetadata]):
    """MLA over the tokens the indexer selected, for CPU (DeepSeek-V3.2 report, section 2: MQA mode of MLA)."""

    is_sparse = True
    # One path for every query: a dense path for short prefills would need vLLM's prefill kernels.
    supports_dense_mha_prefill = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes,
        sliding_window,
        kv_cache_dtype: str,
        logits_soft_cap,
        attn_type: str,
        kv_sharing_target_layer_name,
        indexer: object | None = None,
        topk_indices_buffer: torch.Tensor | None = None,
        **mla_args,
    ) -> None:
        if alibi_slopes or sliding_window or logits_soft_cap or kv_sharing_target_layer_name:
            raise NotImplementedError("DSA models have no alibi, sliding windows, logit soft caps or shared KV")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_lora_rank = mla_args["kv_lora_rank"]
        self.kv_b_proj = mla_args["kv_b_proj"]
        self.indexer = indexer
        self._topk_indices_buffer = topk_indices_buffer
        self.kernels = choose_kernels("cpu")

    @property
    def topk_indices_buffer(self) -> torch.Tensor:
        """[tokens, k] int32. Looked up at each use: vLLM re-points a draft model's indexers at the target's buffer.

        Layers that reuse an earlier layer's selection have no indexer and were handed the buffer.
        """
        return self._topk_indices_buffer if self.indexer is None else self.indexer.topk_indices_buffer

    @topk_indices_buffer.setter
    def topk_indices_buffer(self, buffer: torch.Tensor) -> None:
        self.indexer, self._topk_indices_buffer = None, buffer

    def record_logical_topk_ready(self) -> None:
        """vLLM announces that the selection is complete; nothing here runs ahead of it."""

    def do_kv_cache_update(self, kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale) -> None:
        """Store kv_c_normed [T, kv_lora_rank] and k_pe [T, 1, rope] as rows of kv_cache [pages, 64, head_size]."""
        if kv_cache.numel() == 0:
            return
        slots = slot_mapping.flatten()
        written = slots >= 0
        page, offset = slots[written] // PAGE_TOKENS, slots[written] % PAGE_TOKENS
        latent = torch.cat([kv_c_normed, k_pe.squeeze(1)], dim=-1)[: len(slots)]
        kv_cache[page, offset] = latent[written].to(kv_cache.dtype)

    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer):
        """q: (latent [M, heads, kv_lora_rank], rope [M, heads, rope]); returns ([M, heads, kv_lora_rank], None)."""
        q = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
        tokens = self.topk_indices_buffer[: q.shape[0]]
        out = self.kernels.sparse_mla_attention(
            q.contiguous(), kv_c_and_k_pe_cache, attn_metadata.rows, tokens, self.scale, self.kv_lora_rank
        )
        return out, None
