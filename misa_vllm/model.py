"""The DSA architectures, registered under their own names so that vLLM imports this module to build one.

The classes are vLLM's, unchanged. Importing this module is the moment at which the indexer can be extended:
vLLM's configuration exists by then (some of its decorators read it when their module is imported) and no
layer has been built yet. The extensions act only under `--attention-backend misa`.
"""

from vllm.models.deepseek_v32 import DeepseekV32ForCausalLM, GlmMoeDsaForCausalLM

from misa_vllm.backend import MISAIndexerBackend
from misa_vllm.seam.indexer import extend_indexer

extend_indexer(cpu_storage=MISAIndexerBackend)

__all__ = ["DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"]
