"""The Triton kernels against the fp32 reference, at sizes that the interpreter can bear.

Every unused byte of the cache is NaN and every unused entry of a block table is wild. The lists of the selection
are made short, so that thresholds, overflowing lists and the path over all scores are reached with few tokens.
"""

import pytest
import torch

import misa_vllm.kernels.triton as kernels
from misa_vllm import reference
from misa_vllm.index_cache import PAGE_BYTES, PAGE_TOKENS, means_view, signed_means_view
from misa_vllm.kernels.triton import score, scratch, select, signed_means
from misa_vllm.rows import QueryRows

UNWRITTEN = -7
HEADS = 8
LENGTHS = [200, 64, 65, 1]
ROWS = [(0, 0), (0, 200), (0, 129), (1, 64), (1, 63), (2, 65), (3, 1)]


@pytest.fixture(autouse=True)
def short_lists(monkeypatch):
    monkeypatch.setattr(select, "MIN_LIST_SLOTS", 64)
    monkeypatch.setattr(select, "LISTS", 4)
    monkeypatch.setattr(select, "SAMPLE_STRIDE", 4)


def make_case(lengths=LENGTHS, spec=ROWS, heads=HEADS, keys="random", seed=0):
    """A cache with keys and reference means, and random queries for rows (request, visible)."""
    torch.manual_seed(seed)
    pages_of = [-(-length // PAGE_TOKENS) for length in lengths]
    cache = torch.full((sum(pages_of) + 3, PAGE_BYTES + 64), 0xFF, dtype=torch.uint8)[:, :PAGE_BYTES]
    order = torch.randperm(cache.shape[0]).int()
    table = torch.full((len(lengths), max(pages_of) + 2), 2**30, dtype=torch.int32)
    for request, length in enumerate(lengths):
        table[request, : pages_of[request]] = order[: pages_of[request]]
        order = order[pages_of[request] :]
        k = torch.randn(length, 128)
        if keys == "constant":
            k = torch.ones(length, 128)
        if keys == "wide":
            k *= 10.0 ** torch.linspace(-15, 15, length).unsqueeze(1)
        if keys == "periodic":  # only tokens that a sample with a fixed stride would never see are good
            k[::4] *= 1e-3
        slots = slots_of(table[request], length)
        reference.write_index_keys(k, cache, slots)
        reference.update_page_means(cache, slots)
    request, visible = (torch.tensor(column, dtype=torch.int32) for column in zip(*spec, strict=True))
    q = torch.randn(len(spec), heads, 128).to(torch.float8_e4m3fn)
    return q, torch.randn(len(spec), heads), cache, QueryRows(table, request, visible, int(visible.max()))


def slots_of(pages, length):
    positions = torch.arange(length)
    return pages[positions // PAGE_TOKENS].long() * PAGE_TOKENS + positions % PAGE_TOKENS


def as_sets(tokens):
    return [set(row) for row in tokens.tolist()]


def selected(implementation, q, gates, heads, cache, rows, k, **bounds):
    out = torch.full((len(rows), k + 2), UNWRITTEN, dtype=torch.int32)
    implementation.select_tokens(q, gates, heads, cache, rows, k, out, **bounds)
    assert (out[:, k:] == UNWRITTEN).all()
    return out[:, :k]


@pytest.mark.parametrize("first, last", [(0, 1), (0, 64), (63, 65), (10, 200), (130, 131)])
def test_page_means_of_the_written_pages(first, last):
    _, _, cache, rows = make_case()
    slots = torch.cat([torch.tensor([-1]), slots_of(rows.block_table[0], last)[first:], torch.tensor([-1, -1])])
    means_view(cache).fill_(torch.nan)
    expected = cache.clone()
    reference.update_page_means(expected, slots)
    kernels.update_page_means(cache, slots)
    written = slots[slots >= 0].unique() // PAGE_TOKENS
    # 64 products are added in another order: half an ulp each
    torch.testing.assert_close(means_view(cache)[written], means_view(expected)[written], rtol=64 * 2**-24, atol=1e-6)
    untouched = torch.ones(cache.shape[0], dtype=torch.bool)
    untouched[written] = False
    assert means_view(cache)[untouched].isnan().all()


@pytest.mark.parametrize("pool_block", [64, 128])
@pytest.mark.parametrize("heads, active_heads", [(8, 3), (32, 8)])
def test_routed_heads(heads, active_heads, pool_block):
    q, gates, cache, rows = make_case(heads=heads)
    expected = reference.route_heads(q, gates, cache, rows, active_heads, pool_block)
    assert torch.equal(kernels.route_heads(q, gates, cache, rows, active_heads, pool_block), expected)


def test_the_lower_of_equal_heads_wins():
    q, gates, cache, rows = make_case()
    gates.zero_()
    gates[:, 5] = -1.0
    expected = reference.route_heads(q, gates, cache, rows, 3, 64)
    assert (expected[:, :2] == torch.arange(2)).all() and (expected[:, 2] == 5).any()
    assert torch.equal(kernels.route_heads(q, gates, cache, rows, 3, 64), expected)


def test_routing_is_the_same_alone_and_in_a_batch(monkeypatch):
    from misa_vllm.kernels.triton import route

    q, gates, cache, rows = make_case(lengths=[64 * 70], spec=[(0, 64 * 70), (0, 64 * 66), (0, 64)])
    split = kernels.route_heads(q, gates, cache, rows, 3, 64)  # 2 tiles of blocks, one program each
    monkeypatch.setattr(route, "multiprocessors", lambda device: 0)
    assert torch.equal(kernels.route_heads(q, gates, cache, rows, 3, 64), split)
    monkeypatch.setattr(route, "TRANSIENT_BYTES", 0)
    assert torch.equal(kernels.route_heads(q, gates, cache, rows, 3, 64), split)


# ---------------------------------------------------------------- the statistic mean_positive


def make_signed_case(*args, **options):
    """`make_case` whose pages hold signed means."""
    q, gates, cache, rows = make_case(*args, **options)
    lengths = torch.zeros(rows.block_table.shape[0], dtype=torch.int32)
    lengths = lengths.scatter_reduce(0, rows.request.long(), rows.visible, "amax")
    for pages, length in zip(rows.block_table, lengths.tolist()):
        reference.update_signed_means(cache, slots_of(pages, length))
    return q, gates, cache, rows


@pytest.mark.parametrize("first, last", [(0, 1), (0, 64), (63, 65), (10, 200), (130, 131)])
def test_signed_means_of_the_written_pages(first, last):
    _, _, cache, rows = make_case()
    slots = torch.cat([torch.tensor([-1]), slots_of(rows.block_table[0], last)[first:], torch.tensor([-1, -1])])
    signed_means_view(cache).fill_(torch.nan)
    expected = cache.clone()
    reference.update_signed_means(expected, slots)
    kernels.update_signed_means(cache, slots)
    # sums in another order may round to the next float16
    torch.testing.assert_close(
        signed_means_view(cache).float(), signed_means_view(expected).float(), rtol=2**-10, atol=0, equal_nan=True
    )
    torch.testing.assert_close(cache[:, :8448], expected[:, :8448], rtol=0, atol=0)


@pytest.mark.parametrize("pool_block", [64, 128])
@pytest.mark.parametrize("heads, active_heads", [(8, 3), (32, 8), (5, 5)])
def test_heads_routed_by_signs(heads, active_heads, pool_block):
    q, gates, cache, rows = make_signed_case(heads=heads)
    expected = reference.route_heads_by_signs(q, gates, cache, rows, active_heads, pool_block)
    assert torch.equal(kernels.route_heads_by_signs(q, gates, cache, rows, active_heads, pool_block), expected)


def test_the_lower_of_heads_equal_by_signs_wins():
    q, gates, cache, rows = make_signed_case()
    gates.zero_()
    gates[:, 5] = -1.0
    routed = kernels.route_heads_by_signs(q, gates, cache, rows, 3, 64)
    assert torch.equal(routed, reference.route_heads_by_signs(q, gates, cache, rows, 3, 64))
    assert (routed[:, :2] == torch.arange(2)).all() and (routed[:, 2] == 5).any()


@pytest.mark.parametrize("segment_pages", [1, 2, 16, 64])
@pytest.mark.parametrize("shared", [False, True])
def test_routing_by_signs_is_the_same_however_pages_are_shared(monkeypatch, segment_pages, shared):
    """Scores that differ by a rounding, or not at all."""
    spec = [(0, visible) for visible in (64 * 40, 64 * 40 - 1, 64 * 17 + 5, 64 * 16, 64, 63)] + [(1, 0), (1, 640)]
    q, gates, cache, rows = make_signed_case(lengths=[64 * 40, 640], spec=spec, heads=16)
    q = q.view(torch.uint8)[:, :1].expand(-1, 16, -1).contiguous().view(q.dtype)
    gates = 1 + torch.randint(-2, 3, gates.shape) * 2.0**-23
    alone = [
        kernels.route_heads_by_signs(q[m : m + 1], gates[m : m + 1], cache, rows[m : m + 1], 5, 64)
        for m in range(len(rows))
    ]
    monkeypatch.setattr(signed_means, "SEGMENT_PAGES", segment_pages)
    monkeypatch.setattr(signed_means, "MIN_ROWS_TO_POOL", 0 if shared else 1000)
    monkeypatch.setattr(signed_means, "SCANNED_ROWS", 4)
    assert torch.equal(kernels.route_heads_by_signs(q, gates, cache, rows, 5, 64), torch.cat(alone))


def test_segments_grow_until_their_sums_fit(monkeypatch):
    q, gates, cache, rows = make_signed_case(lengths=[64 * 40], spec=[(0, 64 * 40), (0, 64 * 20)])
    whole = kernels.route_heads_by_signs(q, gates, cache, rows, 3, 64)
    for most in (0, 1, 2):
        monkeypatch.setattr(signed_means, "SUMS_BYTES", 2048 * most)
        for shared in (False, True):
            size, segments = signed_means._segments(1, 64 * 40, shared)
            assert segments <= most and size * segments <= 40
        assert torch.equal(kernels.route_heads_by_signs(q, gates, cache, rows, 3, 64), whole)


@pytest.mark.parametrize("pages", [1, 40, 1024, 1025, 2048, 2**14])
def test_a_row_alone_reads_few_segments_and_few_pages(pages):
    """A row that shares them reads one segment, so only the pages behind it count."""
    for shared in (False, True):
        size, segments = signed_means._segments(1, 64 * pages, shared)
        assert size == 16 if shared else 4 * size * size >= pages and segments <= 4 * size
        assert size * segments <= pages < size * (segments + 1)


@pytest.mark.parametrize("requests", [1, 7, 1024, 8192])
def test_workspace_of_the_signs_is_bounded(requests):
    size, segments = signed_means._segments(requests, 2**20, shared=False)
    taken = requests * segments * 2048
    assert taken <= signed_means.signs_workspace_bytes(requests, 2**20) <= signed_means.SUMS_BYTES
    assert size * (segments + 1) > 2**20 // PAGE_TOKENS


# ---------------------------------------------------------------- selection


@pytest.mark.parametrize("keys", ["random", "constant", "wide", "periodic"])
@pytest.mark.parametrize("all_heads", [False, True])
def test_selected_tokens(keys, all_heads):
    q, gates, cache, rows = make_case(keys=keys)
    heads = None if all_heads else reference.route_heads(q, gates, cache, rows, 3, 64)
    expected = selected(reference, q, gates, heads, cache, rows, 17)
    tokens = selected(kernels, q, gates, heads, cache, rows, 17)
    assert as_sets(tokens) == as_sets(expected)
    assert torch.equal(selected(kernels, q, gates, heads, cache, rows, 17), tokens)


def test_negative_and_infinite_gates():
    q, gates, cache, rows = make_case()
    gates = -gates.abs()
    gates[:, 0] = -torch.inf
    q[:, 0] = q[:, 0].float().abs().to(q.dtype)
    expected = selected(reference, q, gates, None, cache, rows, 17)
    assert as_sets(selected(kernels, q, gates, None, cache, rows, 17)) == as_sets(expected)


@pytest.mark.parametrize("bounds", [{"visible_from": 64}, {"visible_to": 65}, {"visible_from": 2, "visible_to": 199}])
def test_rows_outside_the_bounds_keep_their_output(bounds):
    q, gates, cache, rows = make_case()
    expected = selected(reference, q, gates, None, cache, rows, 40, **bounds)
    assert as_sets(selected(kernels, q, gates, None, cache, rows, 40, **bounds)) == as_sets(expected)


@pytest.mark.parametrize("active_heads", [3, 8, 16])
def test_many_rows_of_one_request(active_heads, monkeypatch):
    monkeypatch.setattr(score, "multiprocessors", lambda device: 1 + active_heads // 8)  # one or more splits
    spec = [(0, visible) for visible in range(180, 200)] + [(1, 1), (1, 64), (1, 130)]
    q, gates, cache, rows = make_case(lengths=[200, 130], spec=spec, heads=16)
    heads = reference.route_heads(q, gates, cache, rows, active_heads, 64)
    expected = selected(reference, q, gates, heads, cache, rows, 17)
    assert as_sets(selected(kernels, q, gates, heads, cache, rows, 17)) == as_sets(expected)


@pytest.mark.parametrize("keys", ["random", "constant", "periodic"])
def test_tokens_and_their_order_are_the_same_alone_and_in_a_batch(keys):
    spec = [(0, visible) for visible in range(185, 200)] + [(1, 130), (1, 0), (0, 64)]
    q, gates, cache, rows = make_case(lengths=[640, 130], spec=spec, keys=keys)
    rows = QueryRows(rows.block_table, rows.request, rows.visible, 640)  # an upper bound, as in a captured graph
    batch = selected(kernels, q, gates, None, cache, rows, 17)
    for m, (_, visible) in enumerate(spec):
        one = slice(m, m + 1)
        row = QueryRows(rows.block_table, rows.request[one], rows.visible[one], visible)
        assert torch.equal(selected(kernels, q[one], gates[one], None, cache, row, 17)[0], batch[m]), f"row {m}"


def test_more_rows_than_a_tile_of_the_transient_memory(monkeypatch):
    q, gates, cache, rows = make_case()
    whole = selected(kernels, q, gates, None, cache, rows, 17)
    monkeypatch.setattr(select, "TRANSIENT_BYTES", 3 * select.workspace_bytes(1, rows.max_visible, 17))
    make, allocated = scratch.scratch, []
    monkeypatch.setattr(select, "scratch", lambda device, *specs: allocated.append(specs) or make(device, *specs))
    assert torch.equal(selected(kernels, q, gates, None, cache, rows, 17), whole)
    assert max(map(lambda specs: scratch.spec_bytes(*specs), allocated)) <= select.TRANSIENT_BYTES


def test_workspace_is_bounded_at_a_million_tokens():
    assert select.workspace_bytes(8192, 2**20, 2048) <= scratch.TRANSIENT_BYTES
    assert select.workspace_bytes(8192, 2**20, 8192) <= scratch.TRANSIENT_BYTES


@pytest.mark.parametrize("k", [7, 30])
def test_reranked_tokens(k):
    q, gates, cache, rows = make_case()
    candidates = torch.full((len(rows), 50), -1, dtype=torch.int32)
    for row, (_, visible) in enumerate(ROWS):
        count = min(visible, 40)
        candidates[row, torch.randperm(50)[:count]] = torch.randperm(max(visible, 1))[:count].int()
    expected = torch.full((len(rows), k), UNWRITTEN, dtype=torch.int32)
    tokens = expected.clone()
    reference.rerank_tokens(q, gates, candidates, cache, rows, k, expected, 1, 199)
    kernels.rerank_tokens(q, gates, candidates, cache, rows, k, tokens, 1, 199)
    assert as_sets(tokens) == as_sets(expected)


@pytest.mark.parametrize(
    ("starts", "lengths", "tokens"),
    [
        ([0, 1, 2, 3], [70, 1, 4000], 3),
        ([0, 1, 2, 2, 2], [70, 1, 0, 0], 4),  # a graph's padding: requests without tokens, tokens without requests
        ([0, 3, 6], [9, 0], 6),
        ([0, 1, 2500, 2502], [9, 2600, 2], 2560),
        ([0, 5], [5], 1),
    ],
)
def test_rows_of_a_step(starts, lengths, tokens):
    starts, lengths = (torch.tensor(values, dtype=torch.int32) for values in (starts, lengths))
    expected = reference.address_rows(starts, lengths, tokens)
    for result, wanted in zip(kernels.address_rows(starts, lengths, tokens), expected, strict=True):
        assert result.dtype == torch.int32 and torch.equal(result, wanted)
