"""The indexer of vLLM's generic DSA model on CPU, `vllm.model_executor.models.deepseek_v2`."""

import functools

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.sparse_attn_indexer import SparseAttnIndexer
from vllm.model_executor.models import deepseek_v2
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from misa_vllm.index_cache import INDEX_HEAD_DIM
from misa_vllm.reference import quantize_fp8


def extend_generic_indexer(index_cache_class: type) -> None:
    """Rebind the index cache's class, the scoring layer and the query's quantisation."""
    # The model names this class directly; there is no attribute to override.
    deepseek_v2.DeepseekV32IndexerCache = index_cache_class

    def per_token_group_quant_fp8(x, group_size, **_):
        assert group_size == INDEX_HEAD_DIM == x.shape[-1]
        values, scale = quantize_fp8(x)
        return values, scale.unsqueeze(-1)

    # Stock is a Triton kernel, which no CPU runs.
    deepseek_v2.per_token_group_quant_fp8 = per_token_group_quant_fp8

    @SparseAttnIndexer.register_oot
    class MISASparseAttnIndexer(SparseAttnIndexer):
        """Scores and selects with the chosen policy; stands in for the class that models construct."""

        def forward_cpu(self, hidden_states, q_quant, k, weights):
            indexer = getattr(self.k_cache, "indexer", None)
            if indexer is None:
                return super().forward_cpu(hidden_states, q_quant, k, weights)
            metadata = get_forward_context().attn_metadata
            if isinstance(metadata, dict):  # absent while vLLM profiles memory
                step = metadata[self.k_cache.prefix]
                tokens = step.num_actual_tokens
                index_cache = self.k_cache.index_cache
                indexer.write_keys(k[:tokens], index_cache, step.slot_mapping)
                indexer.update_statistics(index_cache, step.slot_mapping)
                q, gates, out = q_quant[:tokens], weights[:tokens].float(), self.topk_indices_buffer[:tokens]
                if step.exact is None or step.exact.all():
                    indexer.select(q, gates, index_cache, step.rows, out, exact=step.exact is not None)
                else:
                    for exact in (False, True):
                        part = torch.nonzero(step.exact == exact).flatten()
                        selected = out[part]
                        indexer.select(
                            q.view(torch.uint8)[part].view(q.dtype), gates[part], index_cache, step.rows.take(part),
                            selected, exact,
                        )  # fmt: skip
                        out[part] = selected
            return self.topk_indices_buffer

        forward_native = forward_cpu

    _rewind_generators()


def _rewind_generators() -> None:
    """Let a request with a seed be prefilled in chunks.

    The token sampled at the end of an unfinished chunk is thrown away and the request's generator rewound, by
    its Philox offset, which CPU generators do not have. vLLM never gets there as it turns chunks off on CPU.
    """
    sample, bookkeeping_sync = CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync

    def discarded(runner) -> list[int]:
        mask = runner.discard_request_mask.np[: runner.input_batch.num_reqs]
        return [i for i in mask.nonzero()[0].tolist() if i in runner.input_batch.generators]

    @functools.wraps(sample)
    def _sample(self, *args, **kwargs):
        generators = self.input_batch.generators
        states = {i: generators[i].get_state() for i in discarded(self)}
        output = sample(self, *args, **kwargs)
        for i, state in states.items():
            generators[i].set_state(state)
        return output

    @functools.wraps(bookkeeping_sync)
    def _bookkeeping_sync(self, *args, **kwargs):
        rewound = {i: self.input_batch.generators.pop(i) for i in discarded(self)}
        try:
            return bookkeeping_sync(self, *args, **kwargs)
        finally:
            self.input_batch.generators.update(rewound)

    CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync = _sample, _bookkeeping_sync
