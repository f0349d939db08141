"""MISA: mixture-of-experts routing over the indexer heads of DeepSeek Sparse Attention, for vLLM."""

__version__ = "0.1.0"
