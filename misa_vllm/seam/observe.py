"""The DSA layers of a running engine and the input of their attention, for the tools that measure fidelity."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from misa_vllm.indexer import Indexer

READABLE = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class DSALayer:
    """A layer that selects tokens by an indexer of its own, in this process's model."""

    number: int
    indexer: Indexer
    attention: torch.nn.Module
    """vLLM's MLA layer, with this rank's attention heads."""


def dsa_layers(vllm_config) -> list[DSALayer]:
    """The layers that have an indexer under the backend misa, in the model's order.

    Layers that reuse the selection of an earlier one (`index_topk_freq`) have none.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    found = []
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        k_cache = getattr(getattr(layer, "indexer", None), "k_cache", None)
        indexer = getattr(k_cache, "indexer", None)
        if indexer is not None and hasattr(layer, "impl"):
            found.append(DSALayer(extract_layer_index(name), indexer, layer))
    return sorted(found, key=lambda layer: layer.number)


@dataclass(frozen=True)
class AttentionStep:
    """What one layer's sparse MLA reads in a step, in the latent space (MQA mode); this rank's heads."""

    q: tuple[torch.Tensor, ...]
    """[T, heads, kv_lora_rank] and [T, heads, rope], or one tensor that holds both."""
    kv_cache: torch.Tensor
    """[pages, page_tokens, kv_lora_rank + rope]."""
    block_table: torch.Tensor
    """[R, W] int32, in pages of `kv_cache`."""
    scale: float
    """Of the logits, before the softmax."""

    @property
    def is_readable(self) -> bool:
        """False where queries or cache are quantised: their scales are the attention kernels' own affair."""
        return all(tensor.dtype in READABLE for tensor in (*self.q, self.kv_cache))

    def queries(self, rows: torch.Tensor) -> torch.Tensor:
        """The queries of `rows` [n] int64: [n, heads, kv_lora_rank + rope]."""
        return torch.cat([part[rows] for part in self.q], dim=-1)

    def latents(self, count: int) -> torch.Tensor:
        """The first `count` rows of the first request's cache: [count, kv_lora_rank + rope]."""
        page_tokens = self.kv_cache.shape[1]
        pages = self.block_table[0, : -(-count // page_tokens)].long()
        return self.kv_cache[pages].flatten(0, 1)[:count]


def watch_attention(layer: DSALayer, observer: Callable[[AttentionStep], None]) -> Callable[[], None]:
    """Call `observer` before each sparse attention of the layer, after its selection; returns what ends that."""
    impl, scale = layer.attention.impl, layer.attention.scale
    forward_mqa = impl.forward_mqa

    @functools.wraps(forward_mqa)
    def observed(q, kv_cache, attn_metadata, *args, **kwargs):
        rows = getattr(attn_metadata, "rows", None)  # of our own metadata, on CPU
        block_table = attn_metadata.block_table if rows is None else rows.block_table
        observer(AttentionStep(q if isinstance(q, tuple) else (q,), kv_cache, block_table, scale))
        return forward_mqa(q, kv_cache, attn_metadata, *args, **kwargs)

    impl.forward_mqa = observed

    def stop() -> None:
        del impl.forward_mqa

    return stop
