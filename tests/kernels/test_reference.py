"""The reference against the definitions, written out as loops over plain Python numbers.

Inputs are small multiples of powers of two, so that both are exact and ties are real.
"""

import math

import pytest
import torch

from misa_vllm import reference
from misa_vllm.index_cache import PAGE_BYTES, PAGE_TOKENS, means_view, scales_view

from .cases import make_case, random_heads

HEADS, WIDTH, TOKENS = 6, 4, 37


def relu_dot(q, k):
    return max(sum(a * b for a, b in zip(q, k)), 0.0)


def naive_scores(q, gates, keys, heads):
    return [sum(gates[j] * relu_dot(q[j], key) for j in heads) for key in keys]


def naive_best(scores, tokens, k):
    """The k tokens with the largest score, earlier first among equals; ascending."""
    return sorted(sorted(tokens, key=lambda s: (-scores[s], s))[:k])


def naive_means(keys, block):
    return [
        [sum(column) / block for column in zip(*keys[b : b + block])] for b in range(0, len(keys) - block + 1, block)
    ]


def naive_heads(q, gates, kbar, h):
    scores = [abs(gates[j]) * sum(relu_dot(q[j], mean) for mean in kbar) for j in range(len(q))]
    return sorted(sorted(range(len(q)), key=lambda j: (-scores[j], j))[:h])


def naive_misa(q, gates, keys, k, h, block):
    if len(keys) < block:
        heads = range(len(q))
    else:
        heads = naive_heads(q, gates, naive_means(keys, block), h)
    return naive_best(naive_scores(q, gates, keys, heads), range(len(keys)), k)


def naive_hisa(q, gates, keys, k, block, blocks):
    parts = [range(start, min(start + block, len(keys))) for start in range(0, len(keys), block)]
    means = [[sum(keys[s][d] for s in part) / len(part) for d in range(WIDTH)] for part in parts]
    scores = naive_scores(q, gates, means, range(len(q)))
    scores[0] = scores[-1] = math.inf
    tokens = [s for b in naive_best(scores, range(len(parts)), blocks) for s in parts[b]]
    return naive_best(naive_scores(q, gates, keys, range(len(q))), tokens, k)


@pytest.fixture(params=range(4))
def dense(request):
    generator = torch.Generator().manual_seed(request.param)
    visible = torch.tensor([0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 36, 37])

    def integers(*shape):
        return torch.randint(-2, 3, shape, generator=generator).float()

    return integers(len(visible), HEADS, WIDTH), integers(len(visible), HEADS) / 4, integers(TOKENS, WIDTH), visible


def rows_of(dense):
    """Per row: its number, q, gates and visible keys as lists."""
    q, gates, keys, visible = dense
    for m, count in enumerate(visible.tolist()):
        yield m, q[m].tolist(), gates[m].tolist(), keys[:count].tolist()


def chosen(selected_row):
    tokens = selected_row.tolist()
    count = sum(token >= 0 for token in tokens)
    assert tokens[count:] == [reference.NO_TOKEN] * (len(tokens) - count), "-1 only at the end"
    return tokens[:count]


@pytest.mark.parametrize("k", [1, 5, 16, 40])
def test_dsa(dense, k):
    selected = reference.dsa(*dense, k)
    for m, q, gates, keys in rows_of(dense):
        want = naive_best(naive_scores(q, gates, keys, range(HEADS)), range(len(keys)), k)
        assert chosen(selected[m]) == want


@pytest.mark.parametrize("k, h, block", [(5, 2, 4), (5, 1, 8), (16, 3, 2), (40, 2, 4), (5, 2, 16)])
def test_misa(dense, k, h, block):
    selected = reference.misa(*dense, k, h, block)
    for m, q, gates, keys in rows_of(dense):
        assert chosen(selected[m]) == naive_misa(q, gates, keys, k, h, block)


@pytest.mark.parametrize("k, h, block, candidates", [(3, 2, 4, 8), (5, 1, 8, 6), (5, 2, 4, 5)])
def test_hierarchical(dense, k, h, block, candidates):
    selected = reference.hierarchical(*dense, k, h, block, candidates)
    for m, q, gates, keys in rows_of(dense):
        best = naive_misa(q, gates, keys, candidates, h, block)
        assert chosen(selected[m]) == naive_best(naive_scores(q, gates, keys, range(HEADS)), best, k)


@pytest.mark.parametrize("k, block, blocks", [(3, 4, 3), (10, 8, 2), (5, 4, 4)])
def test_hisa(dense, k, block, blocks):
    # block means are rounded and torch.topk leaves ties open: numbers without ties, far apart for fp32
    generator = torch.Generator().manual_seed(int(dense[2].abs().sum()))
    dense = *(torch.randn(part.shape, generator=generator) for part in dense[:3]), dense[3]
    selected = reference.hisa(*dense, k, block, blocks)
    for m, row_q, row_gates, row_keys in rows_of(dense):
        if row_keys:
            assert chosen(selected[m]) == naive_hisa(row_q, row_gates, row_keys, k, block, blocks)
        else:
            assert chosen(selected[m]) == []


def test_misa_with_all_heads_is_dsa(dense):
    assert torch.equal(reference.misa(*dense, 5, HEADS, 4), reference.dsa(*dense, 5))


def test_hierarchical_with_all_candidates_is_dsa(dense):
    assert torch.equal(reference.hierarchical(*dense, 5, 2, 4, TOKENS), reference.dsa(*dense, 5))


def test_hisa_with_all_blocks_is_dsa(dense):
    assert torch.equal(reference.hisa(*dense, 5, 4, 64), reference.dsa(*dense, 5))


def test_equal_heads_the_lower_wins():
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [0.0] * 5])
    assert reference.top_heads(scores, 2).tolist() == [[1, 2], [0, 1]]


def test_scores_past_the_visible_tokens_are_ignored():
    scores = torch.tensor([[-torch.inf, -1.0, torch.nan, torch.inf], [-torch.inf] * 4])
    assert reference.top_tokens(scores, torch.tensor([2, 3]), 2).tolist() == [[0, 1], [0, 1]]
    assert reference.top_tokens(scores, torch.tensor([2, 3]), 1).tolist() == [[1], [0]]


# ---------------------------------------------------------------- the paged forms


VISIBLE = [[0, 1, 63, 64, 65, 127, 128, 129], [255, 256, 257], [700, 300], [5]]


def dense_rows(case):
    """Per row with visible keys: its number, the dense arguments (q, gates, keys, visible) of the row alone."""
    for m, (request, visible) in enumerate(zip(case.rows.request.tolist(), case.rows.visible.tolist())):
        if visible:
            keys = case.keys[request][:visible].float()
            yield m, (case.q[m : m + 1], case.gates[m : m + 1], keys, case.rows.visible[m : m + 1])


def test_paged_routing_is_dense_routing():
    case = make_case(VISIBLE, exact=True)
    routed = reference.route_heads(case.q, case.gates, case.index_cache, case.rows, 8, 64)
    for m, row in dense_rows(case):
        if int(row[3]) < 64:
            assert routed[m].tolist() == list(range(8))
        else:
            assert torch.equal(routed[m], reference.route(*row, 8, 64)[0])


@pytest.mark.parametrize("active_heads", [None, 8])
def test_paged_selection_is_dense_selection(active_heads):
    case = make_case(VISIBLE, exact=True)
    heads = None if active_heads is None else random_heads(case, active_heads)
    out = torch.full((len(case), 100), -7, dtype=torch.int32)
    reference.select_tokens(case.q, case.gates, heads, case.index_cache, case.rows, 100, out)
    for m, (q, gates, keys, visible) in dense_rows(case):
        if heads is not None:
            q, gates = reference.take_heads(q, gates, heads[m : m + 1])
        assert torch.equal(out[m], reference.dsa(q, gates, keys, visible, 100)[0])
    assert (out[case.rows.visible == 0] == reference.NO_TOKEN).all()


def test_paged_misa_is_dense_misa():
    """Routing and selection joined as a policy joins them: rows without a complete block keep all heads."""
    case = make_case(VISIBLE, exact=True)
    out = torch.full((len(case), 100), -7, dtype=torch.int32)
    arguments = case.index_cache, case.rows, 100, out
    heads = reference.route_heads(case.q, case.gates, case.index_cache, case.rows, 8, 128)
    reference.select_tokens(case.q, case.gates, None, *arguments, visible_to=128)
    reference.select_tokens(case.q, case.gates, heads, *arguments, visible_from=128)
    for m, row in dense_rows(case):
        assert torch.equal(out[m], reference.misa(*row, 100, 8, 128)[0])


def test_paged_rerank_is_dense_rerank():
    case = make_case(VISIBLE, exact=True)
    candidates = torch.full((len(case), 200), -1, dtype=torch.int32)
    reference.select_tokens(case.q, case.gates, random_heads(case, 8), case.index_cache, case.rows, 200, candidates)
    shuffled = candidates[:, torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    out = torch.full((len(case), 100), -7, dtype=torch.int32)
    reference.rerank_tokens(case.q, case.gates, shuffled, case.index_cache, case.rows, 100, out)
    for m, (q, gates, keys, visible) in dense_rows(case):
        assert torch.equal(out[m], reference.rerank(q, gates, keys, candidates[m : m + 1], 100)[0])


def test_written_keys_read_back_within_fp8():
    """Half a unit in the last place of e4m3 (3 bits of mantissa), or half the smallest step for tiny values."""
    k = torch.randn(130, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 130).unsqueeze(1)
    cache = torch.full((5, PAGE_BYTES), 0xFF, dtype=torch.uint8)
    pages = torch.tensor([3, 0, 4], dtype=torch.int32)
    tokens = torch.arange(130)
    slots = pages[tokens // PAGE_TOKENS].long() * PAGE_TOKENS + tokens % PAGE_TOKENS
    skipped = torch.cat([torch.tensor([-1]), slots])
    reference.write_index_keys(torch.cat([torch.full((1, 128), 9.0), k]), cache, skipped)
    read = reference.read_index_keys(cache, pages, 130)
    scale = scales_view(cache)[pages[tokens // PAGE_TOKENS].long(), tokens % PAGE_TOKENS].unsqueeze(1)
    assert (scale.log2() % 1 == 0).all(), "scales are powers of two"
    assert ((read - k).abs() <= (k.abs() * 2.0**-4).clamp(min=2.0**-10 * scale)).all()
    assert (cache[[1, 2]] == 0xFF).all(), "other pages keep their bytes"


def test_page_means():
    case = make_case([[150]], exact=True)
    pages = case.rows.block_table[0, :3].long()
    for page, keys in zip(pages.tolist(), case.keys[0].split(PAGE_TOKENS)):
        want = [math.fsum(column) / len(keys) for column in zip(*keys.tolist())]
        assert means_view(case.index_cache)[page].tolist() == pytest.approx(want, rel=2.0**-22)


def test_a_page_without_room_for_a_mean():
    with pytest.raises(ValueError, match="are needed to hold the page mean"):
        means_view(torch.zeros(2, PAGE_BYTES - 4, dtype=torch.uint8))


def test_sparse_attention_by_hand():
    case = make_case([[130]], heads=32)
    kv = torch.full((case.index_cache.shape[0], PAGE_TOKENS, 12), torch.nan)
    tokens = [3, 64, 129]
    values = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    for token, value in zip(tokens, values):
        kv[case.rows.block_table[0, token // PAGE_TOKENS].long(), token % PAGE_TOKENS] = value
    q = torch.randn(1, 2, 12, generator=torch.Generator().manual_seed(1))
    out = reference.sparse_mla_attention(q, kv, case.rows, torch.tensor([[3, -1, 64, 129]]), 0.3, 8)
    for head in range(2):
        weights = [math.exp(0.3 * sum(a * b for a, b in zip(q[0, head].tolist(), v))) for v in values.tolist()]
        for d in range(8):
            want = sum(w * v[d] for w, v in zip(weights, values.tolist())) / sum(weights)
            assert out[0, head, d].item() == pytest.approx(want, rel=1e-5, abs=1e-6)


def test_rows_of_a_step():
    """A prefill of three tokens, a decode, a request that a graph pads with, and tokens behind the last."""
    starts, lengths = torch.tensor([0, 3, 4, 4], dtype=torch.int32), torch.tensor([10, 7, 0], dtype=torch.int32)
    request, visible = reference.address_rows(starts, lengths, 6)
    assert request[:4].tolist() == [0, 0, 0, 1]
    assert visible.tolist() == [8, 9, 10, 7, 0, 0]
    assert request.max() < len(lengths)
