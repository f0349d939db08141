"""Hostile inputs for the kernels, and what their results are held to.

Every byte of a cache that no row may see is 0xFF (NaN as fp8 and as fp32), pages are in random order and further
apart than they need be, and the unused part of a block table holds a page id that does not exist.
"""

from dataclasses import dataclass

import torch

from misa_vllm import reference
from misa_vllm.index_cache import INDEX_HEAD_DIM, PAGE_BYTES, PAGE_TOKENS, STOCK_PAGE_BYTES, keys_view, scales_view
from misa_vllm.rows import QueryRows

WILD_PAGE = 2**30
NEAR_PAGES = (0, 1, 63, 64, 65)

# Relative error of one head's dot product of 128 fp8 products, as a share of the sum of their magnitudes.
# fp32: 128 roundings to 24 bits. Hopper's fp8 matrix units keep 13 bits below the largest term of each group of 32
# that they add, and so do the Triton kernels that use them.
DOT_ERROR = {"cpu": 128 * 2.0**-24, "triton": 128 * 2.0**-13, "cuda": 128 * 2.0**-13}


@dataclass
class Case:
    """Inputs of the indexer kernels, and the dequantised keys they stand for."""

    q: torch.Tensor
    gates: torch.Tensor
    index_cache: torch.Tensor
    rows: QueryRows
    keys: list[torch.Tensor]
    """Per request, [tokens, 128] float64."""

    def __len__(self) -> int:
        return len(self.rows)

    def with_gates(self, gates: torch.Tensor) -> "Case":
        return Case(self.q, gates.to(self.q.device), self.index_cache, self.rows, self.keys)

    def row(self, m: int) -> "Case":
        """The case of one row alone."""
        part = slice(m, m + 1)
        return Case(self.q[part], self.gates[part], self.index_cache, self.rows[part], self.keys)

    def head_terms(self, m: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of row m: relu(q . k) [H, visible] and sum |q * k| [H, visible], float64."""
        keys = self.keys[int(self.rows.request[m])][: int(self.rows.visible[m])]
        q = self.q[m].cpu().double()
        return (q @ keys.T).relu(), q.abs() @ keys.abs().T

    def scores(self, m: int, heads: torch.Tensor | None, dot_error: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Row m's token scores [visible] in float64, and how far a kernel's may be from them."""
        terms, magnitudes = self.head_terms(m)
        gates = self.gates[m].cpu().double()
        if heads is not None:
            chosen = heads[m].cpu().long()
            terms, magnitudes, gates = terms[chosen], magnitudes[chosen], gates[chosen]
        weighted = gates.unsqueeze(1) * terms
        head_sum_error = (len(gates) + 2) * 2.0**-24
        tolerance = gates.abs() @ magnitudes * dot_error + weighted.abs().sum(dim=0) * head_sum_error
        return weighted.sum(dim=0), tolerance


def make_case(
    visible: list[list[int]],
    heads: int = 64,
    seed: int = 0,
    device: str = "cpu",
    exact: bool = False,
) -> Case:
    """Rows of several requests, interleaved at random.

    Args:
        visible: per request, how many keys each of its rows sees; the longest row sets the request's length.
        exact: keys, queries and gates are small multiples of powers of two, so that every order of summation gives
            the same score in fp32 (and many scores are equal).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def integers(*shape):
        return torch.randint(-2, 3, shape, generator=generator).float()

    draw = integers if exact else normal
    lengths = [max(counts, default=0) for counts in visible]
    pages_of = [-(-length // PAGE_TOKENS) for length in lengths]
    num_pages = sum(pages_of) + 3
    order = torch.randperm(num_pages, generator=generator)
    index_cache = torch.full((num_pages, PAGE_BYTES + 128), 0xFF, dtype=torch.uint8)[:, :PAGE_BYTES]
    block_table = torch.full((len(visible), max(pages_of) + 6), WILD_PAGE, dtype=torch.int32)[:, : max(pages_of) + 2]
    keys = []
    for request, (length, pages) in enumerate(zip(lengths, pages_of)):
        block_table[request, :pages] = order[:pages]
        order = order[pages:]
        # channels of very different size, as a rotary embedding leaves them
        channel_scale = torch.exp2(torch.arange(INDEX_HEAD_DIM) % 5 - 2.0) if not exact else 1.0
        values, scales = reference.quantize_fp8(draw(length, INDEX_HEAD_DIM) * channel_scale)
        tokens = torch.arange(length)
        page, offset = block_table[request][tokens // PAGE_TOKENS].long(), tokens % PAGE_TOKENS
        keys_view(index_cache).view(torch.uint8)[page, offset] = values.view(torch.uint8)
        scales_view(index_cache)[page, offset] = scales
        reference.update_page_means(index_cache, page * PAGE_TOKENS + offset)
        keys.append(values.double() * scales.double().unsqueeze(1))
    request = torch.tensor([r for r, counts in enumerate(visible) for _ in counts], dtype=torch.int32)
    counts = torch.tensor([count for counts in visible for count in counts], dtype=torch.int32)
    shuffle = torch.randperm(len(counts), generator=generator)
    rows = QueryRows(block_table.to(device), request[shuffle].to(device), counts[shuffle].to(device), max(lengths))
    q = draw(len(counts), heads, INDEX_HEAD_DIM).to(torch.float8_e4m3fn)
    gates = draw(len(counts), heads) * (0.25 if exact else (INDEX_HEAD_DIM * heads) ** -0.5)
    index_cache = _to_device(index_cache, device)
    return Case(q.to(device), gates.to(device), index_cache, rows, keys)


def _to_device(index_cache: torch.Tensor, device: str) -> torch.Tensor:
    """The cache on `device` with its page stride: `.to` would make it dense."""
    if device == "cpu":
        return index_cache
    wide = torch.full((index_cache.shape[0], index_cache.stride(0)), 0xFF, dtype=torch.uint8, device=device)
    wide[:, : index_cache.shape[1]] = index_cache.to(device)
    return wide[:, : index_cache.shape[1]]


def random_heads(case: Case, active_heads: int, seed: int = 1) -> torch.Tensor:
    """Distinct heads of every row, ascending: [M, active_heads] int32."""
    noise = torch.rand(case.gates.shape, generator=torch.Generator().manual_seed(seed))
    return noise.argsort(dim=1)[:, :active_heads].sort(dim=1).values.to(torch.int32).to(case.q.device)


def assert_best(scores: torch.Tensor, tolerance: torch.Tensor, chosen: list[int], k: int, what: str) -> None:
    """`chosen` are min(k, all) distinct indices, and none left out is better than one taken, beyond the tolerance."""
    count = min(k, len(scores))
    assert len(chosen) == count, f"{what}: {len(chosen)} chosen of {len(scores)}, expected {count}"
    assert len(set(chosen)) == count, f"{what}: chosen twice"
    assert all(0 <= index < len(scores) for index in chosen), f"{what}: {max(chosen)} is out of range {len(scores)}"
    left_out = torch.ones(len(scores), dtype=torch.bool)
    left_out[chosen] = False
    if count and left_out.any():
        worst_taken = (scores + tolerance)[chosen].min()
        best_left = (scores - tolerance)[left_out].max()
        assert worst_taken >= best_left, f"{what}: {best_left:.9g} was left out for {worst_taken:.9g}"


def tokens_of(selected_row: torch.Tensor) -> list[int]:
    return [token for token in selected_row.tolist() if token >= 0]


def stock_pages(index_cache: torch.Tensor) -> torch.Tensor:
    """The cache as stock vLLM's pages, without room for means."""
    return index_cache[:, :STOCK_PAGE_BYTES]
