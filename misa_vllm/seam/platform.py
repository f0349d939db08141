"""vLLM's platform: options are validated with its own, CPU limits are lifted, CUDA's attention backend is picked."""

import functools

import torch

from misa_vllm.index_cache import PAGE_TOKENS
from misa_vllm.log import info_once, logger, print_as_one_line
from misa_vllm.seam import BACKEND_NAME, BACKEND_PATH, is_selected, register_backend, settings_for
from misa_vllm.settings import MISAConfigError


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
    from misa_vllm import metrics  # late, as in `settings_for`

    print_as_one_line(MISAConfigError)
    settings = settings_for(vllm_config)
    _refuse_unsupported(vllm_config)
    metrics.export(settings)
    _select_for_draft(vllm_config.speculative_config)
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


def _select_for_draft(speculative_config) -> None:
    """Give a multi-token-prediction draft, a layer of the same model, the target's backend.

    One of vLLM's two model runners picks a backend anew for every draft that names none.
    """
    if speculative_config is not None and speculative_config.method == "mtp":
        speculative_config.attention_backend = speculative_config.attention_backend or register_backend()


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


@functools.cache
def stock_sparse_mla_backend(device_capability, **selector_fields):
    """The CUDA backend class that vLLM would pick by itself, or the reasons why there is none.

    Takes the arguments of `AttentionBackend.validate_configuration`; returns (class or None, list of reasons).
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.selector import AttentionSelectorConfig

    candidates, refused = current_platform.get_valid_backends(
        device_capability, AttentionSelectorConfig(**selector_fields)
    )
    if not candidates:
        return None, [f"{backend.name}: {'; '.join(reasons)}" for backend, (_, reasons) in refused.items()]
    best = min(candidates, key=lambda candidate: candidate.priority).backend_class
    info_once(f"MISA: attention over the selected tokens is vLLM's {best.get_name()}.")
    return best, []
