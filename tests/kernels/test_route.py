"""`update_page_means` and `route_heads` of every implementation."""

import pytest
import torch

from misa_vllm.index_cache import MEAN_OFFSET, PAGE_TOKENS, keys_view, means_view, scales_view

from .cases import DOT_ERROR, assert_best, make_case

VISIBLE = [[0, 1, 63, 64, 65, 127, 128, 129], [255, 256, 257, 1023, 1024, 1025], [2300, 1100], [640]]


def slots_of(case, request, tokens):
    pages = case.rows.block_table[request][tokens // PAGE_TOKENS].long()
    return pages * PAGE_TOKENS + tokens % PAGE_TOKENS


def kbar_of(case, request, pool_block, visible):
    """Means of the complete pool blocks from the dequantised keys, [blocks, 128] float64."""
    blocks = visible // pool_block
    return case.keys[request][: blocks * pool_block].reshape(blocks, pool_block, -1).mean(dim=1)


def assert_routed(subject, case, routed, pool_block):
    """`routed` [M, h] are the best heads of every row, within what rounding allows."""
    assert routed.dtype == torch.int32 and len(routed) == len(case)
    active_heads = routed.shape[1]
    for m, (request, visible) in enumerate(zip(case.rows.request.tolist(), case.rows.visible.tolist())):
        heads = routed[m].tolist()
        assert heads == sorted(heads)
        if visible < pool_block:
            assert heads == list(range(active_heads))
            continue
        kbar = kbar_of(case, request, pool_block, visible)
        q, gate = case.q[m].cpu().double(), case.gates[m].cpu().double().abs()
        scores = gate * (q @ kbar.T).relu().sum(dim=1)
        # the means themselves are rounded: sums over a page, then over the pages of a block
        mean_error = (PAGE_TOKENS + pool_block // PAGE_TOKENS) * 2.0**-24
        magnitudes = (q.abs() @ case.keys[request][:visible].abs().mean(dim=0)) * kbar.shape[0]
        error = DOT_ERROR[subject.name] + mean_error + kbar.shape[0] * 2.0**-24
        assert_best(scores, gate * magnitudes * error, heads, active_heads, f"row {m}")


@pytest.mark.parametrize(
    "all_heads, active_heads, pool_block",
    [(64, 8, 64), (64, 8, 128), (32, 8, 256), (64, 8, 1024), (64, 1, 64), (32, 2, 128), (64, 4, 64), (64, 16, 256),
     (32, 32, 64), (64, 64, 128)],
)  # fmt: skip
def test_routes_to_the_best_heads(subject, all_heads, active_heads, pool_block):
    case = make_case(VISIBLE, all_heads, device=subject.device)
    routed = subject.kernels.route_heads(
        case.q, case.gates, case.index_cache, case.rows, active_heads, pool_block
    ).cpu()
    assert routed.shape == (len(case), active_heads)
    assert_routed(subject, case, routed, pool_block)


def test_equal_heads_the_lower_wins(subject):
    """All heads are alike, and their router scores exact in any order of summation."""
    case = make_case([[64, 200]], 32, exact=True, device=subject.device)
    case.q = case.q[:, :1].repeat(1, 32, 1)
    case = case.with_gates(torch.ones_like(case.gates))
    routed = subject.kernels.route_heads(case.q, case.gates, case.index_cache, case.rows, 8, 64)
    assert routed.cpu().tolist() == [list(range(8))] * 2


def test_negative_gates_count_by_magnitude(subject):
    case = make_case(VISIBLE, device=subject.device)
    negated = case.with_gates(-case.gates)
    routes = [
        subject.kernels.route_heads(c.q, c.gates, c.index_cache, c.rows, 8, 64) for c in (case, negated)
    ]
    assert torch.equal(*routes)


def test_rows_alone_and_reruns_route_the_same(subject):
    case = make_case(VISIBLE, device=subject.device)

    def route(part):
        return subject.kernels.route_heads(part.q, part.gates, part.index_cache, part.rows, 8, 64)

    batch = route(case)
    assert torch.equal(route(case), batch)
    for m in range(len(case)):
        assert torch.equal(route(case.row(m))[0], batch[m]), f"row {m}"


# ---------------------------------------------------------------- page means


def test_means_of_the_written_pages(subject):
    """Partial and whole pages of two requests; keys, scales and all other means keep their bytes."""
    case = make_case([[200], [130]], device=subject.device)
    means_view(case.index_cache).fill_(torch.nan)
    before = case.index_cache.clone()
    slots = torch.cat(
        [
            slots_of(case, 0, torch.arange(70, 200, device=subject.device)),
            torch.full((3,), -1, device=subject.device),
            slots_of(case, 1, torch.arange(0, 40, device=subject.device)),
            torch.full((2,), -1, device=subject.device),
        ]
    )
    subject.kernels.update_page_means(case.index_cache, slots)
    means = means_view(case.index_cache).cpu()
    written = {0: [(1, 128), (2, 192), (3, 200)], 1: [(0, 40)]}
    expected_nan = torch.ones(len(means), dtype=torch.bool)
    for request, pages in written.items():
        for page, end in pages:
            number = int(case.rows.block_table[request, page])
            keys = case.keys[request][page * PAGE_TOKENS : end]
            tolerance = (keys.abs().mean(dim=0) * (PAGE_TOKENS + 1) * 2.0**-24).clamp(min=2.0**-126)
            assert ((means[number].double() - keys.mean(dim=0)).abs() <= tolerance).all()
            expected_nan[number] = False
    assert torch.equal(means.isnan().all(dim=1), expected_nan)
    assert torch.equal(case.index_cache[:, :MEAN_OFFSET], before[:, :MEAN_OFFSET])


@pytest.mark.parametrize("step", [1, 7, 64, 100])
def test_means_do_not_depend_on_the_steps(subject, step):
    case = make_case([[150]], device=subject.device)
    slots = slots_of(case, 0, torch.arange(150, device=subject.device))
    pages = case.rows.block_table[0, :3].long()
    subject.kernels.update_page_means(case.index_cache, slots)
    whole = means_view(case.index_cache)[pages].clone()
    means_view(case.index_cache).fill_(torch.nan)
    for part in slots.split(step):
        subject.kernels.update_page_means(case.index_cache, part)
    assert torch.equal(means_view(case.index_cache)[pages], whole)


def test_a_reused_page_forgets_its_past(subject):
    """What lies behind the last written slot is another request's key: it must not count."""
    case = make_case([[64]], device=subject.device)
    page = int(case.rows.block_table[0, 0])
    keys_view(case.index_cache).view(torch.uint8)[page, 5:] = 0x7E
    scales_view(case.index_cache)[page, 5:] = 1e30
    subject.kernels.update_page_means(case.index_cache, slots_of(case, 0, torch.arange(5, device=subject.device)))
    mean, keys = means_view(case.index_cache)[page].cpu().double(), case.keys[0][:5]
    assert ((mean - keys.mean(dim=0)).abs() <= keys.abs().sum(dim=0) * 6 * 2.0**-24).all()


def test_no_slots(subject):
    case = make_case([[64]], device=subject.device)
    before = case.index_cache.clone()
    for slots in (torch.empty(0, dtype=torch.int64), torch.full((5,), -1)):
        subject.kernels.update_page_means(case.index_cache, slots.to(subject.device))
    assert torch.equal(case.index_cache, before)
