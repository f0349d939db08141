"""The entry point vLLM calls in every process it starts (`vllm.general_plugins`)."""


def register() -> None:
    """Make `--attention-backend misa` known to vLLM. Safe to call any number of times, in any process.

    Imports neither a GPU runtime nor model code, and changes nothing for users of other backends.
    """
    from misa_vllm import seam
    from misa_vllm.seam.platform import extend_platform

    problem = seam.version_problem()
    if problem is not None:
        from misa_vllm.log import logger

        logger.warning("The attention backend misa is not available: %s", problem)
        return
    seam.register_backend()
    seam.register_architectures()
    extend_platform()
