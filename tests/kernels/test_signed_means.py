"""The statistic mean_positive: `update_signed_means` and `route_heads_by_signs` of every implementation."""

import importlib.util
import math
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from misa_vllm import reference
from misa_vllm.eval.statistics import mean_positive
from misa_vllm.index_cache import MEAN_OFFSET, PAGE_TOKENS, keys_view, scales_view, signed_means_view
from misa_vllm.indexer import Indexer
from misa_vllm.rows import QueryRows
from misa_vllm.settings import IndexerSettings

from .cases import WILD_PAGE, Case, assert_best, make_case
from .conftest import Subject
from .test_route import VISIBLE, slots_of

PREFILL = list(range(880, 1030))
HALF_STEP = 2.0**-11
"""Rounding to float16, relative; 2^-25 below its normal numbers."""


@pytest.fixture(scope="module")
def signs(subject) -> Subject:
    if subject.name == "cuda" and subject.device == "cpu":
        pytest.skip("the CUDA kernels have none of their own")
    return subject


def make_signed_case(visible, heads=64, seed=0, device="cpu", exact=False) -> Case:
    """`make_case` whose whole and partial pages hold signed means, of the reference's rounding."""
    case = make_case(visible, heads, seed, device, exact)
    for request, keys in enumerate(case.keys):
        for page, part in enumerate(keys.split(PAGE_TOKENS) if len(keys) else ()):
            number = int(case.rows.block_table[request, page])
            means = reference.signed_means(part).half()
            signed_means_view(case.index_cache)[number] = means.to(device)
    return case


def route(subject, case, active_heads=8, pool_block=64):
    return subject.kernels.route_heads_by_signs(
        case.q, case.gates, case.index_cache, case.rows, active_heads, pool_block
    ).cpu()


def scores_of(case, m, pool_block):
    """S [H] of row m in float64, from the statistics in the cache, and how far float32 may be from it."""
    blocks = int(case.rows.visible[m]) // pool_block
    pages = case.rows.block_table[int(case.rows.request[m]), : blocks * pool_block // PAGE_TOKENS].long()
    positive, negative = signed_means_view(case.index_cache)[pages].cpu().double().sum(dim=0)
    q = case.q[m].cpu().double()
    scores = case.gates[m].cpu().double().abs() * (q.relu() @ positive + (-q).relu() @ negative)
    return scores, scores * (2 * q.shape[1] + len(pages)) * 2.0**-24


def assert_routed(case, routed, pool_block):
    assert routed.dtype == torch.int32 and len(routed) == len(case)
    active_heads = routed.shape[1]
    for m, visible in enumerate(case.rows.visible.tolist()):
        heads = routed[m].tolist()
        assert heads == sorted(heads)
        if visible < pool_block:
            assert heads == list(range(active_heads))
        else:
            assert_best(*scores_of(case, m, pool_block), heads, active_heads, f"row {m}")


# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize("pool_block", [64, 128])
def test_the_reference_is_the_definition(pool_block):
    """Loops over plain numbers; inputs are so small that both are exact."""
    case = make_case([[0, 63, 64, 129, 256], [200]], heads=6, exact=True)
    for request, keys in enumerate(case.keys):
        reference.update_signed_means(case.index_cache, slots_of(case, request, torch.arange(len(keys))))
    routed = reference.route_heads_by_signs(case.q, case.gates, case.index_cache, case.rows, 2, pool_block)
    for m, (request, visible) in enumerate(zip(case.rows.request.tolist(), case.rows.visible.tolist())):
        q, gates, keys = case.q[m].tolist(), case.gates[m].tolist(), case.keys[request].tolist()
        score = [0.0] * 6
        for j in range(6):
            for key in keys[: visible // pool_block * pool_block]:
                score[j] += sum(max(a, 0) * max(b, 0) + max(-a, 0) * max(-b, 0) for a, b in zip(q[j], key))
            score[j] *= abs(gates[j])
        assert routed[m].tolist() == sorted(sorted(range(6), key=lambda j: (-score[j], j))[:2])


def test_the_reference_is_what_is_evaluated():
    """Equal to `misa_vllm.eval.statistics.mean_positive`, of which the published figures are."""
    case = make_signed_case([[640, 300, 64]])
    scores = mean_positive(case.q.float(), case.gates, case.keys[0].float(), case.rows.visible, 64)
    for m in range(len(case)):
        expected, _ = scores_of(case, m, 64)
        torch.testing.assert_close(scores[m].double(), expected, rtol=HALF_STEP, atol=1e-6)


# ---------------------------------------------------------------- routing


@pytest.mark.parametrize(
    "all_heads, active_heads, pool_block",
    [(64, 8, 64), (64, 8, 128), (32, 8, 256), (64, 8, 1024), (64, 1, 64), (5, 2, 128), (48, 16, 192), (32, 32, 64),
     (64, 64, 128), (1, 1, 64)],
)  # fmt: skip
def test_routes_to_the_best_heads(signs, all_heads, active_heads, pool_block):
    case = make_signed_case(VISIBLE, all_heads, device=signs.device)
    assert_routed(case, route(signs, case, active_heads, pool_block), pool_block)


def test_routes_many_rows_to_the_best_heads(signs):
    case = make_signed_case([PREFILL, [300, 64, 1]], device=signs.device)
    assert_routed(case, route(signs, case), 64)


def test_equal_heads_the_lower_wins(signs):
    case = make_signed_case([[64, 200]], 32, exact=True, device=signs.device)
    case.q = case.q[:, :1].repeat(1, 32, 1)
    case = case.with_gates(torch.ones_like(case.gates))
    assert route(signs, case).tolist() == [list(range(8))] * 2


def test_negative_gates_count_by_magnitude(signs):
    case = make_signed_case(VISIBLE, device=signs.device)
    assert torch.equal(route(signs, case), route(signs, case.with_gates(-case.gates)))


def near_ties(case, pool_block=64):
    """The case with two queries that all heads of a row share, and gates that set heads apart by a rounding or none."""
    case.q = case.q.view(torch.uint8)[:, :2].repeat(1, case.q.shape[1] // 2, 1).view(torch.float8_e4m3fn)
    case = case.with_gates(torch.ones_like(case.gates))
    noise = torch.randint(-1, 2, case.gates.shape, generator=torch.Generator().manual_seed(3)) * 2.0**-23
    gates = torch.ones(case.gates.shape) + noise
    for m, visible in enumerate(case.rows.visible.tolist()):
        if visible >= pool_block:
            scores, _ = scores_of(case, m, pool_block)
            gates[m, 1::2] *= (scores[0] / scores[1]).float()
    return case.with_gates(gates)


@pytest.mark.parametrize("pool_block", [64, 256])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_row_gets_the_same_heads_in_every_batch(signs, pool_block, size):
    case = near_ties(make_signed_case([PREFILL, [2300, 1300, 64, 1]], device=signs.device), pool_block)
    whole = route(signs, case, 8, pool_block)
    assert torch.equal(route(signs, case, 8, pool_block), whole)
    rows = case.rows
    longest = QueryRows(rows.block_table, rows.request, rows.visible, 64 * rows.block_table.shape[1])
    for start in (0, (len(case) - size) // 2, len(case) - size):
        part = slice(start, start + size)
        some = Case(case.q[part], case.gates[part], case.index_cache, longest[part], case.keys)
        assert torch.equal(route(signs, some, 8, pool_block), whole[part])


def test_padding_rows(signs):
    case = make_signed_case([[0, 300, 0]], device=signs.device)
    padding = case.rows.visible == 0
    case.q.view(torch.uint8)[padding] = 0x7F
    case.gates[padding] = torch.nan
    routed = route(signs, case)
    assert routed[padding.cpu()].tolist() == [list(range(8))] * 2
    assert_routed(case, routed, 64)
    assert route(signs, Case(case.q[:0], case.gates[:0], case.index_cache, case.rows[:0], case.keys)).shape == (0, 8)


def test_large_and_small_statistics(signs):
    """float16's largest number and its subnormals, over so many pages that their sum needs float32's range."""
    case = make_signed_case([[64 * 40]], 32, device=signs.device)
    view = signed_means_view(case.index_cache)
    pages = case.rows.block_table[0, :40].long()
    view[pages] = torch.tensor([65504.0, 2.0**-24], device=signs.device).half().reshape(1, 2, 1)
    routed = route(signs, case)
    assert_routed(case, routed, 64)
    view[pages] = 2.0**-24
    assert_routed(case, route(signs, case), 64)


# ---------------------------------------------------------------- the pages' statistics


def test_means_of_the_written_pages(signs):
    """Partial and whole pages of two requests; keys, scales and all other statistics keep their bytes."""
    case = make_case([[200], [130]], device=signs.device)
    signed_means_view(case.index_cache).fill_(torch.nan)
    before = case.index_cache.clone()
    slots = torch.cat(
        [
            slots_of(case, 0, torch.arange(70, 200, device=signs.device)),
            torch.full((3,), -1, device=signs.device),
            slots_of(case, 1, torch.arange(0, 40, device=signs.device)),
            torch.full((2,), -1, device=signs.device),
        ]
    )
    signs.kernels.update_signed_means(case.index_cache, slots)
    means = signed_means_view(case.index_cache).cpu()
    expected_nan = torch.ones(len(means), dtype=torch.bool)
    for request, pages in {0: [(1, 128), (2, 192), (3, 200)], 1: [(0, 40)]}.items():
        for page, end in pages:
            number = int(case.rows.block_table[request, page])
            keys = case.keys[request][page * PAGE_TOKENS : end]
            wanted = torch.stack([keys.relu().mean(dim=0), (-keys).relu().mean(dim=0)])
            # sums over the page in float32, then rounded to float16
            torch.testing.assert_close(means[number].double(), wanted, rtol=HALF_STEP + 2.0**-17, atol=2.0**-24)
            expected_nan[number] = False
    assert torch.equal(means.isnan().flatten(1).all(dim=1), expected_nan)
    assert torch.equal(case.index_cache[:, :MEAN_OFFSET], before[:, :MEAN_OFFSET])


@pytest.mark.parametrize("step", [1, 7, 64, 100])
def test_means_do_not_depend_on_the_steps(signs, step):
    case = make_case([[150]], device=signs.device)
    slots = slots_of(case, 0, torch.arange(150, device=signs.device))
    pages = case.rows.block_table[0, :3].long()
    signs.kernels.update_signed_means(case.index_cache, slots)
    whole = signed_means_view(case.index_cache)[pages].clone()
    signed_means_view(case.index_cache).fill_(torch.nan)
    for part in slots.split(step):
        signs.kernels.update_signed_means(case.index_cache, part)
    assert torch.equal(signed_means_view(case.index_cache)[pages], whole)


def test_a_reused_page_forgets_its_past(signs):
    """What lies behind the last written slot is another request's key: it must not count."""
    case = make_case([[64]], device=signs.device)
    page = int(case.rows.block_table[0, 0])
    keys_view(case.index_cache).view(torch.uint8)[page, 5:] = 0x7F
    scales_view(case.index_cache)[page, 5:] = 1e30
    signs.kernels.update_signed_means(case.index_cache, slots_of(case, 0, torch.arange(5, device=signs.device)))
    wanted = reference.signed_means(case.keys[0][:5])
    torch.testing.assert_close(
        signed_means_view(case.index_cache)[page].cpu().float(), wanted, rtol=HALF_STEP + 2.0**-20, atol=2.0**-24
    )


@pytest.mark.parametrize("magnitude", [1e-7, 1e-4, 1e3, 1e6])
def test_means_that_float16_can_hardly_hold(signs, magnitude):
    """Below its normal numbers they lose digits, above its largest they stay there."""
    case = make_case([[64]], device=signs.device)
    page = int(case.rows.block_table[0, 0])
    scale = 2.0 ** round(math.log2(magnitude))
    scales_view(case.index_cache)[page] *= scale
    signs.kernels.update_signed_means(case.index_cache, slots_of(case, 0, torch.arange(64, device=signs.device)))
    keys = case.keys[0] * scale
    wanted = torch.stack([keys.relu().mean(dim=0), (-keys).relu().mean(dim=0)]).clamp(max=65504.0)
    means = signed_means_view(case.index_cache)[page].cpu().double()
    torch.testing.assert_close(means, wanted, rtol=HALF_STEP + 2.0**-20, atol=2.0**-25 * 1.001)


def test_no_slots(signs):
    case = make_case([[64]], device=signs.device)
    before = case.index_cache.clone()
    for slots in (torch.empty(0, dtype=torch.int64), torch.full((5,), -1)):
        signs.kernels.update_signed_means(case.index_cache, slots.to(signs.device))
    assert torch.equal(case.index_cache, before)


def test_pages_without_room_are_refused(signs):
    case = make_case([[64]], device=signs.device)
    stock = case.index_cache[:, :MEAN_OFFSET]
    with pytest.raises(ValueError):
        signs.kernels.update_signed_means(stock, torch.zeros(1, dtype=torch.int64, device=signs.device))
    with pytest.raises(ValueError):
        signs.kernels.route_heads_by_signs(case.q, case.gates, stock, case.rows, 8, 64)


# ---------------------------------------------------------------- the CPU's variants


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_every_cpu_variant(cpu_kernels, isa):
    """The instruction sets that this machine would not choose, in a process of their own."""
    environment = {**os.environ, "MISA_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "[cpu and not emulated"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    if "does not run on this machine" in run.stdout:
        pytest.skip(f"no {isa} on this machine")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def test_values_that_would_read_elsewhere_are_refused(cpu_kernels):
    case = make_signed_case([[300]])
    with pytest.raises(RuntimeError, match="slot_mapping entry"):
        cpu_kernels.update_signed_means(case.index_cache, torch.tensor([WILD_PAGE]))
    case.rows.block_table[0, 3] = WILD_PAGE
    with pytest.raises(RuntimeError, match="block_table entry"):
        cpu_kernels.route_heads_by_signs(case.q, case.gates, case.index_cache, case.rows, 8, 64)
    case.rows.request[0] = 1
    with pytest.raises(RuntimeError, match="request"):
        cpu_kernels.route_heads_by_signs(case.q, case.gates, case.index_cache, case.rows, 8, 64)


# ---------------------------------------------------------------- who computes it


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_cuda_takes_tritons():
    from misa_vllm.kernels import cuda
    from misa_vllm.kernels.triton import page_means, signed_means

    assert cuda.update_signed_means is page_means.update_signed_means
    for name in ("route_heads_by_signs", "signs_workspace_bytes"):
        assert getattr(cuda, name) is getattr(signed_means, name)
    with pytest.raises(AttributeError, match="route_by_median"):
        cuda.route_by_median


@pytest.mark.parametrize("policy, routed_by", [("misa", "signs"), ("hierarchical", "signs"), ("dsa", None)])
def test_policies_route_by_the_statistic(policy, routed_by):
    """Neither the means nor what routes by them is used, also where an implementation has one launch for both."""
    case = make_signed_case([[300, 200, 20]])
    settings = IndexerSettings(policy, 64, 20, 8, 64, 40, 0, statistic="mean_positive", routes_heads=policy != "dsa")
    called = []
    indexer = Indexer(settings, "cpu")
    indexer.kernels = SimpleNamespace(
        select_tokens=reference.select_tokens,
        rerank_tokens=reference.rerank_tokens,
        route_and_select=None if policy == "dsa" else pytest.fail,
        route_heads_by_signs=lambda *args: called.append("signs") or reference.route_heads_by_signs(*args),
        update_signed_means=lambda *args: called.append("update"),
        workspace_bytes=lambda *args: 0,
        signs_workspace_bytes=lambda *args: 5,
    )
    out = torch.empty(3, 20, dtype=torch.int32)
    indexer.update_statistics(case.index_cache, torch.zeros(1, dtype=torch.int64))
    indexer.select(case.q, case.gates, case.index_cache, case.rows, out)
    assert called == ([] if routed_by is None else ["update", "signs"])
    heads = None if policy == "dsa" else reference.route_heads_by_signs(
        case.q, case.gates, case.index_cache, case.rows, 8, 64
    )
    if policy == "misa":
        wanted = torch.empty_like(out)
        reference.select_tokens(case.q, case.gates, heads, case.index_cache, case.rows, 20, wanted)
        assert torch.equal(out, wanted)


@pytest.mark.parametrize("statistic, calls", [("mean_positive", 1), ("mean", 0)])
def test_prefills_routing_is_compiled_before_the_first(statistic, calls):
    """While memory is profiled, on rows that see nothing: the reference would read pages that are not there.

    Once, not for each layer.
    """
    seen = []
    kernels = ModuleType("kernels")
    kernels.route_heads_by_signs = lambda *args: seen.append(args) or reference.route_heads_by_signs(*args)
    kernels.workspace_bytes, kernels.signs_workspace_bytes = lambda *args: 4, lambda *args: 5
    for _ in range(2):
        indexer = Indexer(IndexerSettings("misa", 32, 20, 8, 128, 40, 0, statistic=statistic), "cpu")
        indexer.kernels = kernels
        indexer.reserve(8192, 100_000, torch.device("cpu"))
    assert len(seen) == calls
    for q, gates, index_cache, rows, active_heads, pool_block in seen:
        assert q.shape == (len(rows), 32, 128) and gates.shape == q.shape[:2] and len(rows) > 8
        assert rows.block_table.shape == (1, 1563) and rows.max_visible == 100_000 and not rows.visible.any()
        assert (active_heads, pool_block) == (8, 128)
