"""The decode kernels on the CPU (tests/cuda_emulation): hostile rows, and that a broken kernel is noticed.

Scores are exact in fp32, so that what is selected must equal the reference's to the token.
"""

import re
from dataclasses import replace

import pytest
import torch

from misa_vllm import reference
from misa_vllm.index_cache import MEAN_OFFSET, PAGE_TOKENS, scales_view
from misa_vllm.rows import QueryRows

from .. import cuda_emulation
from .cases import make_case, random_heads

NO_BOUND = 2**31 - 1
UNTOUCHED = -7


def decode_select(operators, case, heads, k, visible_from=0, visible_to=NO_BOUND, workspace=None):
    """Always the kernel for few rows; its workspace holds anything."""
    out = torch.full((len(case), k + 3), UNTOUCHED, dtype=torch.int32)
    if workspace is None:
        workspace = torch.full((operators.decode_workspace_bytes(len(case)),), 0xA5, dtype=torch.uint8)
    rows = case.rows
    operators.decode_select(
        case.q, case.gates, heads, case.index_cache, rows.block_table, rows.request, rows.visible, rows.max_visible, k,
        out, visible_from, visible_to, workspace,
    )  # fmt: skip
    assert (out[:, k:] == UNTOUCHED).all()
    return out[:, :k]


def assert_equals_reference(operators, case, heads, k, **bounds):
    want = torch.full((len(case), k), UNTOUCHED, dtype=torch.int32)
    reference.select_tokens(case.q, case.gates, heads, case.index_cache, case.rows, k, want, **bounds)
    torch.testing.assert_close(decode_select(operators, case, heads, k, **bounds), want, rtol=0, atol=0)


def in_order(case):
    """The rows of each request next to one another, as an engine has them."""
    order = torch.argsort(case.rows.request.long() * 2**20 + case.rows.visible)
    case.q, case.gates, case.rows = case.q[order], case.gates[order], case.rows.take(order)
    return case


@pytest.fixture(scope="module")
def operators(emulated_cuda):
    return emulated_cuda._EXTENSION.operators


@pytest.fixture(scope="module")
def replayed(emulated_cuda, tmp_path_factory):
    """The decode kernels with one signature for all launches, as a graph that is replayed has."""
    drawn = "args.exchange.signature = next_signature();"
    seen = []

    def edit(text):
        seen.append(drawn in text)
        return text.replace(drawn, "args.exchange.signature = 1;")

    operators = cuda_emulation.build(tmp_path_factory.mktemp("replayed"), ["decode_select"], edit)
    assert sum(seen) == 1, "the line is not there any more"
    return operators


LONG_AND_SHORT = [[9000], [64, 65, 66], [0], [1], [2049, 2050], [700], [5000, 5001, 5002, 5003, 5004]]


@pytest.mark.parametrize("multiprocessors, k", [(1, 2048), (5, 64), (24, 1), (24, 63)])
def test_rows_of_many_lengths(operators, multiprocessors, k):
    operators.configure(multiprocessors, seed=k)
    case = in_order(make_case(LONG_AND_SHORT, 16, seed=k, exact=True))
    assert_equals_reference(operators, case, random_heads(case, 8), k)


@pytest.mark.parametrize("active_heads", [1, 2, 8, 9, 32, None])
def test_any_number_of_heads(operators, active_heads):
    operators.configure(6, seed=3)
    case = in_order(make_case([[3000, 3001], [700], [129, 130, 131, 132]], 64, seed=3, exact=True))
    heads = None if active_heads is None else random_heads(case, active_heads)
    assert_equals_reference(operators, case, heads, 100)


@pytest.mark.parametrize("rows_each", [2, 4, 7])
def test_speculative_rows_share_their_keys(operators, rows_each):
    operators.configure(7, seed=rows_each)
    lengths = [4000, 70, 1100]
    case = in_order(make_case([[n - i for i in range(rows_each)] for n in lengths], 16, seed=rows_each, exact=True))
    assert_equals_reference(operators, case, random_heads(case, 4), 500)


@pytest.mark.parametrize("bound", [20_000, 1 << 20])
def test_a_loose_bound_of_the_lengths(operators, bound):
    """A captured graph knows the model's longest context only."""
    operators.configure(8, seed=1)
    case = in_order(make_case([[3000], [0], [100], [2049]], 16, exact=True))
    case.rows = QueryRows(case.rows.block_table, case.rows.request, case.rows.visible, bound)
    assert_equals_reference(operators, case, random_heads(case, 8), 64)


@pytest.mark.parametrize(
    "scores", ["constant", "negative", "infinite", "minus infinite", "nan", "nan keys", "two values", "all magnitudes"]
)
@pytest.mark.parametrize("multiprocessors", [1, 9])
def test_scores_that_are_alike_or_not_finite(operators, scores, multiprocessors):
    operators.configure(multiprocessors, seed=11)
    case = in_order(make_case([[3000], [2998, 2999], [2100]], 8, seed=5, exact=True))
    gates = case.gates
    if scores == "constant":
        gates = torch.zeros_like(gates)
    elif scores == "negative":
        gates = -gates.abs() - 0.25
    elif scores == "infinite":
        gates = torch.where(gates > 0.25, torch.inf, gates)
    elif scores == "minus infinite":
        gates = torch.where(gates > 0, -torch.inf, gates)
    elif scores == "nan":
        gates = torch.full_like(gates, torch.nan)
    elif scores == "two values":
        gates = torch.zeros_like(gates)
        gates[:, 0] = 1.0
        case.q.view(torch.uint8)[:, 0] = 0
        case.q.view(torch.uint8)[:, 0, 5] = 0x38
    else:
        scales = scales_view(case.index_cache)
        if scores == "nan keys":
            scales[::3, ::2] = torch.nan
        else:
            exponents = torch.arange(scales.numel()).view(scales.shape) * 37 % 100 - 50
            scales[:] = torch.where(scales.isnan(), scales, torch.exp2(exponents.float()))
    case = case.with_gates(gates)
    assert_equals_reference(operators, case, random_heads(case, 8), 2048)


@pytest.mark.parametrize(
    "order, rows_each",
    [("any", 1), ("any", 2), ("rising", 1), ("rising", 2), ("falling", 1), ("constant", 1), ("mostly nan", 1)],
)
def test_rows_that_do_not_fit_into_one_cta(operators, order, rows_each):
    """The CTA keeps the best of the keys so far, several times over."""
    operators.configure(1, seed=rows_each)
    case = in_order(make_case([[30_000 - i for i in range(rows_each)], [2100]], 8, seed=8, exact=True))
    count = case.rows.block_table.shape[1] - 2
    if order != "any":
        # scores grow or fall by powers of two with the page, or are all the same
        step = {"rising": 1, "falling": -1, "constant": 0, "mostly nan": 0}[order]
        exponents = torch.arange(count) * step * 60 // count
        scales = scales_view(case.index_cache)
        pages = case.rows.block_table[0, :count].long()
        scales[pages] = torch.where(scales[pages].isnan(), torch.nan, torch.exp2(exponents.float()).unsqueeze(1))
    if order == "constant":
        case = case.with_gates(torch.zeros_like(case.gates))
    elif order == "mostly nan":
        scales_view(case.index_cache)[case.rows.block_table[0, 100:400].long()] = torch.nan
    assert_equals_reference(operators, case, random_heads(case, 8), 2048 if order != "constant" else 500)


def test_a_replayed_launch_finds_the_workspace_of_the_last_one(replayed):
    """A graph replays a launch with the same arguments, other lengths and what the launch before left behind."""
    case = in_order(make_case([[5000], [3000], [700, 701]], 8, seed=6, exact=True))
    heads = random_heads(case, 8)
    replayed.configure(9, seed=6)
    workspace = torch.full((replayed.decode_workspace_bytes(len(case)),), 0xA5, dtype=torch.uint8)
    lengths = case.rows.visible
    for share in (1.0, 0.3, 0.9, 0.0, 0.6):
        visible = (lengths * share).int()
        case.rows = QueryRows(case.rows.block_table, case.rows.request, visible, case.rows.max_visible)
        want = torch.full((len(case), 200), UNTOUCHED, dtype=torch.int32)
        reference.select_tokens(case.q, case.gates, heads, case.index_cache, case.rows, 200, want)
        assert torch.equal(decode_select(replayed, case, heads, 200, workspace=workspace), want)


def assert_routes_and_selects(kernels, case, k, pool_block, active_heads=8, want=None, **bounds):
    """One launch gives the heads and tokens of the two kernels that it replaces, to the bit; returns the tokens."""
    operators = kernels._EXTENSION.operators
    out = torch.full((len(case), k + 3), UNTOUCHED, dtype=torch.int32)
    routed = torch.full((len(case), active_heads), UNTOUCHED, dtype=torch.int32)
    operators_before = operators.launches
    args = (case.q, case.gates, case.index_cache, case.rows, active_heads, pool_block)
    kernels.route_and_select(*args, k, out, routed=routed, **bounds)
    assert operators.launches == operators_before + 1
    assert (out[:, k:] == UNTOUCHED).all()
    heads = kernels.route_heads(*args)
    scored = (case.rows.visible > k) & (case.rows.visible >= bounds.get("visible_from", 0))
    assert torch.equal(routed, heads.masked_fill(~scored.unsqueeze(1), UNTOUCHED))
    want = torch.full((len(case), k), UNTOUCHED, dtype=torch.int32)
    reference.select_tokens(case.q, case.gates, heads, case.index_cache, case.rows, k, want, **bounds)
    torch.testing.assert_close(out[:, :k], want, rtol=0, atol=0)
    return out[:, :k]


BLOCK_BORDERS = [[8192], [8191], [8256], [16_448], [4096], [1024], [1023], [0], [600]]


@pytest.mark.parametrize("batch", range(1, 10))
def test_routing_and_selection_in_one_launch(operators, emulated_cuda, batch):
    operators.configure(2 + 3 * batch, seed=batch)
    case = in_order(make_case(BLOCK_BORDERS[:batch], [64, 32, 16][batch % 3], seed=batch, exact=True))
    assert_routes_and_selects(emulated_cuda, case, 512, [1024, 64, 128][batch % 3])


@pytest.mark.parametrize("pool_block", [64, 128, 1024])
@pytest.mark.parametrize("multiprocessors", [1, 2, 9, 33])
def test_one_row_is_routed_alike_by_any_number_of_ctas(operators, emulated_cuda, pool_block, multiprocessors):
    """Borders of the CTAs' pages lie on borders of pool blocks, and a page before and behind them."""
    operators.configure(multiprocessors, seed=pool_block)
    for visible in (9 * pool_block, 16_384 - 64, 16_384 + 64):
        case = make_case([[visible]], 64, seed=visible, exact=True)
        assert_routes_and_selects(emulated_cuda, case, 300, pool_block)


@pytest.mark.parametrize("rows_each, multiprocessors", [(2, 3), (3, 20), (4, 3), (4, 20)])
def test_routing_of_speculative_rows(operators, emulated_cuda, rows_each, multiprocessors):
    """A request's rows see different numbers of complete blocks, of one segment and of several."""
    operators.configure(multiprocessors, seed=rows_each)
    lengths = [20_481, 9217, 4097, 1025, 700]
    case = in_order(make_case([[n - i for i in range(rows_each)] for n in lengths], 64, seed=rows_each, exact=True))
    assert_routes_and_selects(emulated_cuda, case, 600, 1024)


@pytest.mark.parametrize("active_heads", [1, 9, 32, 64])
def test_routing_to_any_number_of_heads(operators, emulated_cuda, active_heads):
    operators.configure(7, seed=active_heads)
    case = in_order(make_case([[9000, 9001], [700], [2049]], 64, seed=3, exact=True))
    assert_routes_and_selects(emulated_cuda, case, 100, 128, active_heads)


def test_routing_of_a_row_that_does_not_fit_into_one_cta(operators, emulated_cuda):
    operators.configure(2, seed=1)
    case = in_order(make_case([[50_000], [30_000], [3000], [70]], 16, seed=1, exact=True))
    assert_routes_and_selects(emulated_cuda, case, 1000, 1024, visible_from=1024)


def test_a_replayed_route_finds_the_workspace_of_the_last_one(replayed, emulated_cuda):
    """Sums, keys and counts of the launch before lie where this one's will, and lengths change."""
    case = in_order(make_case([[18_000], [4000], [700, 701]], 32, seed=6, exact=True))
    replayed.configure(12, seed=6)
    workspace = torch.full(
        (replayed.decode_route_workspace_bytes(len(case), case.rows.max_visible),), 0xA5, dtype=torch.uint8
    )
    lengths = case.rows.visible
    for share in (1.0, 0.95, 0.3, 0.3, 1.0, 0.0):
        rows = QueryRows(case.rows.block_table, case.rows.request, (lengths * share).int(), case.rows.max_visible)
        q = case.q.roll(int(share * 100), 0)
        heads = emulated_cuda.route_heads(q, case.gates, case.index_cache, rows, 8, 256)
        want, out = torch.full((2, len(case), 200), UNTOUCHED, dtype=torch.int32)
        reference.select_tokens(q, case.gates, heads, case.index_cache, rows, 200, want)
        replayed.decode_route_select(
            q, case.gates, case.index_cache, rows.block_table, rows.request, rows.visible, rows.max_visible, 8, 256,
            200, out, 0, workspace, None,
        )  # fmt: skip
        assert torch.equal(out, want)


@pytest.mark.parametrize("multiprocessors", [2, 7, 20])
def test_routing_reads_the_page_means_of_the_kernel_before(operators, emulated_cuda, multiprocessors):
    case = in_order(make_case([[12_000], [5000, 5001], [700], [1500], [0]], 32, seed=4, exact=True))
    rows = case.rows
    heads = emulated_cuda.route_heads(case.q, case.gates, case.index_cache, rows, 8, 256)
    want, out = torch.full((2, len(case), 512), UNTOUCHED, dtype=torch.int32)
    emulated_cuda.select_tokens(case.q, case.gates, heads, case.index_cache, rows, 512, want, visible_from=513)
    pages = [rows.block_table[r, : -(-n // PAGE_TOKENS)] for r, n in zip(rows.request, rows.visible)]
    slots = torch.cat([p.long() * PAGE_TOKENS + PAGE_TOKENS - 1 for p in pages if len(p)]).unique()
    slots = slots[~torch.isin(slots // PAGE_TOKENS, torch.stack([p[-1] for p in pages if len(p)]))]  # full pages
    cache = case.index_cache.clone()
    case.index_cache.view(torch.uint8)[slots // PAGE_TOKENS, MEAN_OFFSET:] = 0xFF
    operators.configure(multiprocessors, seed=multiprocessors)
    with operators.stream():
        emulated_cuda.update_page_means(case.index_cache, slots)
        emulated_cuda.route_and_select(case.q, case.gates, case.index_cache, rows, 8, 256, 512, out, visible_from=513)
    assert torch.equal(case.index_cache, cache)
    assert torch.equal(out, want)


@pytest.mark.parametrize("length, multiprocessors", [(4096, 9), (8192, 33), (8193, 33), (8000, 3)])
@pytest.mark.parametrize("rows_each", [1, 4])
def test_short_rows_exchange_their_keys(operators, length, multiprocessors, rows_each):
    operators.configure(multiprocessors, seed=length)
    case = in_order(make_case([[length - i for i in range(rows_each)], [2000]], 8, seed=length, exact=True))
    heads = random_heads(case, 8)
    assert_equals_reference(operators, case, heads, 700)
    gates = torch.where(case.gates > 0.25, torch.inf, case.gates)
    gates[0] = torch.nan
    assert_equals_reference(operators, case.with_gates(gates), heads, 700)


@pytest.mark.parametrize("visible_from, visible_to", [(0, 2049), (65, 66), (2050, NO_BOUND)])
def test_only_the_rows_within_bounds(operators, visible_from, visible_to):
    operators.configure(5, seed=2)
    case = in_order(make_case(LONG_AND_SHORT, 8, exact=True))
    assert_equals_reference(operators, case, None, 64, visible_from=visible_from, visible_to=visible_to)


def test_any_order_of_events_selects_the_same(operators):
    case = in_order(make_case([[3000, 2999], [700], [1500]], 8, seed=9, exact=True))
    for seed in range(5):
        operators.configure(1 + seed, seed=seed)
        assert_equals_reference(operators, case, random_heads(case, 8), 200)


def test_routing_and_selection_of_a_long_row(operators, emulated_cuda):
    operators.configure(12, seed=4)
    case = in_order(make_case([[20_000], [9000, 9001]], 32, seed=4, exact=True))
    routed = emulated_cuda.route_heads(case.q, case.gates, case.index_cache, case.rows, 8, 1024)
    want = reference.route_heads(case.q, case.gates, case.index_cache, case.rows, 8, 1024)
    for mine, best in zip(routed.tolist(), want.tolist()):  # fp16 means may turn what is nearly equal
        assert mine == sorted(set(mine)) and len(set(mine) & set(best)) >= 7
    assert_equals_reference(operators, case, routed, 2048)


@pytest.mark.parametrize(
    "removed",
    [
        "        ptx::mbarrier_wait(&full[stage], parity);\n",
    ],
)
def test_a_missing_barrier_is_noticed(tmp_path, removed):
    if cuda_emulation.find_compiler() is None:
        pytest.skip("no C++ compiler on Linux")
    seen = []

    def edit(text):
        seen.append(removed in text)
        return re.sub(r"launch<(16|32|64)>", "launch<8>", text.replace(removed, ""))

    broken = cuda_emulation.build(tmp_path, ["decode_select"], edit)
    assert sum(seen) == 1, "the line to remove is not there any more"
    case = in_order(make_case([[6000], [700, 701]], 8, exact=True))
    noticed = 0
    for seed in range(6):
        broken.configure(5, seed)
        try:
            assert_equals_reference(broken, case, random_heads(case, 8), 600)
        except (AssertionError, cuda_emulation.EmulationError):
            noticed += 1
    assert noticed, "the emulation runs as if nothing was missing"


def test_memory_that_is_not_the_kernels_is_noticed(operators):
    operators.configure(4, seed=0)
    case = in_order(make_case([[700]], 8, exact=True))
    case.rows.block_table[0, 3] = case.index_cache.shape[0] + 5
    with pytest.raises(cuda_emulation.EmulationError, match="page"):
        decode_select(operators, case, None, 64)
    case = in_order(make_case([[700]], 8, exact=True))
    short = case.rows.block_table[:, : 700 // PAGE_TOKENS].clone()
    case.rows = QueryRows(short, case.rows.request, case.rows.visible, case.rows.max_visible)
    with pytest.raises(cuda_emulation.EmulationError, match="not the kernel's|page"):
        decode_select(operators, case, None, 64)


def test_more_keys_than_can_be_counted_are_refused(emulated_cuda):
    case = make_case([[300]], 64)
    rows = replace(case.rows, max_visible=2**25 + 1)
    out = torch.empty(1, 64, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="at most 33554432 keys, not 33554433"):
        emulated_cuda.route_and_select(case.q, case.gates, case.index_cache, rows, 8, 64, 64, out)
