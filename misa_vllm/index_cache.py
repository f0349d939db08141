"""The paged cache of index keys, with a statistic of each page's keys behind them.

A page holds 64 tokens of one layer and is `PAGE_BYTES` long:

    offset     size   content
    0          8192   64 keys, 128 x float8_e4m3fn each
    8192        256   64 scales, float32; dequantised key = float8 value * scale
    8448        512   the router's statistic of the page's dequantised keys k:
                        mean            mean of k, 128 x float32
                        mean_positive   mean of relu(k), then mean of relu(-k), 128 x float16 each, at most 65504

The first 8448 bytes are the page of stock vLLM (`STOCK_PAGE_BYTES`), so every kernel that honours the
page stride reads keys unchanged. The statistic shares the page's block id, hence prefix caching, preemption,
copy-on-write and KV transfer carry it without knowing of it. Which of the two a cache holds is an option of the engine.

Everywhere in this package `index_cache` is a uint8 tensor [num_pages, page_bytes] whose last dimension is
contiguous and whose page stride may be larger than `page_bytes`.
"""

import torch

PAGE_TOKENS = 64
INDEX_HEAD_DIM = 128
SCALES_OFFSET = PAGE_TOKENS * INDEX_HEAD_DIM
STOCK_PAGE_BYTES = SCALES_OFFSET + PAGE_TOKENS * 4
MEAN_OFFSET = STOCK_PAGE_BYTES
MEAN_BYTES = INDEX_HEAD_DIM * 4
PAGE_BYTES = MEAN_OFFSET + MEAN_BYTES


def keys_view(index_cache: torch.Tensor) -> torch.Tensor:
    """The keys, [num_pages, 64, 128] float8_e4m3fn, sharing memory with `index_cache`."""
    keys = index_cache[:, :SCALES_OFFSET].unflatten(1, (PAGE_TOKENS, INDEX_HEAD_DIM))
    return keys.view(torch.float8_e4m3fn)


def scales_view(index_cache: torch.Tensor) -> torch.Tensor:
    """The keys' scales, [num_pages, 64] float32, sharing memory with `index_cache`."""
    return index_cache[:, SCALES_OFFSET:MEAN_OFFSET].view(torch.float32)


def means_view(index_cache: torch.Tensor) -> torch.Tensor:
    """The page means, [num_pages, 128] float32, sharing memory with `index_cache`.

    Raises:
        ValueError: the pages are stock vLLM's and have no room for a mean.
    """
    if index_cache.shape[1] < PAGE_BYTES:
        raise ValueError(
            f"index cache pages are {index_cache.shape[1]} bytes, {PAGE_BYTES} are needed to hold the page mean"
        )
    return index_cache[:, MEAN_OFFSET:PAGE_BYTES].view(torch.float32)


def signed_means_view(index_cache: torch.Tensor) -> torch.Tensor:
    """The page means of relu(k) and of relu(-k), [num_pages, 2, 128] float16, sharing memory with `index_cache`.

    Raises:
        ValueError: as `means_view`, whose bytes these are.
    """
    return means_view(index_cache).view(torch.float16).unflatten(1, (2, INDEX_HEAD_DIM))
