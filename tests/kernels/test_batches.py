"""What a row gets does not depend on the rows that share its call: prefill, chunks of it and decode agree.

Implementations compute few rows otherwise than many; the calls here lie on both sides of where they change over.
"""

import pytest
import torch

from misa_vllm.rows import QueryRows

from .cases import Case, make_case, random_heads
from .test_select import rerank, select

PREFILL = list(range(880, 1030))  # visible keys of consecutive rows, across pages and pool blocks
CALLS = [1, 7, 63, 64, 65]


@pytest.fixture(scope="module")
def case(subject):
    return make_case([PREFILL, [300, 64, 1]], device=subject.device)


def parts(case, size):
    """Calls of `size` rows at the start, in the middle and at the end, with the bound of keys that a graph has."""
    rows = case.rows
    longest = QueryRows(rows.block_table, rows.request, rows.visible, 64 * rows.block_table.shape[1])
    for start in (0, (len(case) - size) // 2, len(case) - size):
        part = slice(start, start + size)
        yield part, Case(case.q[part], case.gates[part], case.index_cache, longest[part], case.keys)


@pytest.mark.parametrize("size", CALLS)
@pytest.mark.parametrize("active_heads, pool_block", [(8, 64), (8, 256), (1, 128)])
def test_heads(subject, case, active_heads, pool_block, size):
    def route(part):
        return subject.kernels.route_heads(
            part.q, part.gates, part.index_cache, part.rows, active_heads, pool_block
        ).cpu()

    whole = route(case)
    for part, rows in parts(case, size):
        assert torch.equal(route(rows), whole[part])


@pytest.mark.parametrize("size", CALLS)
@pytest.mark.parametrize("active_heads", [None, 1, 8, 64])
def test_tokens(subject, case, active_heads, size):
    heads = None if active_heads is None else random_heads(case, active_heads)
    whole = select(subject, case, heads).sort(dim=1).values
    for part, rows in parts(case, size):
        tokens = select(subject, rows, None if heads is None else heads[part])
        assert torch.equal(tokens.sort(dim=1).values, whole[part])


@pytest.mark.parametrize("size", CALLS)
def test_reranked_tokens(subject, case, size):
    candidates = select(subject, case, random_heads(case, 8), k=256).to(subject.device)
    whole = rerank(subject, case, candidates).sort(dim=1).values
    for part, rows in parts(case, size):
        assert torch.equal(rerank(subject, rows, candidates[part]).sort(dim=1).values, whole[part])
