"""The prefill kernels on the CPU (tests/cuda_emulation). Scores are exact in fp32, so that what is selected must equal
the reference's to the token."""

import re

import pytest
import torch

from misa_vllm import reference
from misa_vllm.index_cache import scales_view
from misa_vllm.rows import QueryRows

from .. import cuda_emulation
from .cases import make_case, random_heads

NO_BOUND = 2**31 - 1
UNTOUCHED = -7


def assert_equals_reference(operators, case, heads, k):
    """Always the kernels for many rows; their workspace holds anything."""
    rows = case.rows
    out = torch.full((len(case), k + 3), UNTOUCHED, dtype=torch.int32)
    workspace = torch.full((operators.prefill_workspace_bytes(rows.max_visible),), 0xFF, dtype=torch.uint8)
    operators.prefill_select(
        case.q, case.gates, heads, case.index_cache, rows.block_table, rows.request, rows.visible, rows.max_visible, k,
        out, 0, NO_BOUND, workspace,
    )  # fmt: skip
    want = torch.full_like(out, UNTOUCHED)
    reference.select_tokens(case.q, case.gates, heads, case.index_cache, rows, k, want[:, :k])
    torch.testing.assert_close(out, want, rtol=0, atol=0)


@pytest.fixture(scope="module")
def operators(emulated_cuda):
    return emulated_cuda._EXTENSION.operators


@pytest.mark.parametrize("k", [64, 700])
def test_a_tile_and_a_part_of_one(operators, k):
    operators.configure(5, seed=k)
    case = make_case([[3000 - i for i in range(70)]], 16, seed=1, exact=True)
    assert_equals_reference(operators, case, random_heads(case, 8), k)


@pytest.mark.parametrize("k, bound", [(1, 3000), (700, 3000), (64, 1 << 20)])
def test_a_row_alone(operators, k, bound):
    """`bound`: the longest context that the caller knows of, which may be much longer than the row's."""
    operators.configure(40, seed=k)
    case = make_case([[3000]], 16, seed=k, exact=True)
    case.rows = QueryRows(case.rows.block_table, case.rows.request, case.rows.visible, bound)
    assert_equals_reference(operators, case, random_heads(case, 8), k)


def test_requests_of_a_row_each(operators):
    operators.configure(6, seed=2)
    case = make_case([[200 + 25 * i] for i in range(20)], 16, seed=2, exact=True)
    assert_equals_reference(operators, case, random_heads(case, 8), 100)


def test_more_tokens_than_lists_are_kept_for(operators):
    operators.configure(5, seed=3)
    case = make_case([[16_500, 16_500, 100, 16_385, 0]], 16, seed=3, exact=True)
    assert_equals_reference(operators, case, random_heads(case, 8), 16_385)


@pytest.mark.parametrize("k, length", [(3000, 6000), (12_000, 16_000), (64, 140_000)])
def test_more_than_is_held_at_a_time(operators, k, length):
    """Entries of a row's lists in registers, positions in the bitmap of the selected ones."""
    operators.configure(5, seed=k)
    case = make_case([[length, length - 1]], 8, seed=k, exact=True)
    assert_equals_reference(operators, case, random_heads(case, 4), k)


@pytest.mark.parametrize("active_heads", [2, 16, 64])
def test_rows_of_many_lengths(operators, active_heads):
    operators.configure(3, seed=active_heads)
    case = make_case([[2047, 2048, 2049, 100], [700], [0], [63, 64, 65]], 64, seed=active_heads, exact=True)
    assert_equals_reference(operators, case, random_heads(case, active_heads), 64)


@pytest.mark.parametrize("k", [500, 30, 2000])
@pytest.mark.parametrize("scores", ["constant", "infinite", "nan", "nan keys"])
def test_scores_that_are_alike_or_not_finite(operators, scores, k):
    operators.configure(4, seed=11)
    case = make_case([[2500] * 3 + [2499], [2300, 1100]], 8, seed=5, exact=True)
    gates = case.gates
    if scores == "nan keys":
        scales_view(case.index_cache)[::3, ::2] = torch.nan
    else:
        value = {"constant": 0.0, "nan": torch.nan, "infinite": torch.inf}[scores]
        gates = torch.where(gates > 0.25, value, gates) if scores == "infinite" else torch.full_like(gates, value)
    case = case.with_gates(gates)
    assert_equals_reference(operators, case, random_heads(case, 8), k)


@pytest.mark.parametrize("gates", ["few positive", "few that count", "none positive"])
def test_many_scores_alike_behind_a_threshold(operators, gates):
    """Where most of a row's scores are 0, the threshold is, too, or lies far below the scores that are selected."""
    operators.configure(5, seed=6)
    case = make_case([[6000 - i for i in range(12)]], 16, seed=6, exact=True)
    draw = torch.rand(case.gates.shape, generator=torch.Generator().manual_seed(6))
    changed = {
        "few positive": torch.where(draw < 0.8, -case.gates.abs(), case.gates),
        "few that count": torch.where(draw < 0.9, 0.0, case.gates),
        "none positive": -case.gates.abs(),
    }
    case = case.with_gates(changed[gates])
    assert_equals_reference(operators, case, random_heads(case, 8), 300)


FENCE = "ptx::fence_proxy_async();"


@pytest.mark.parametrize(
    "kernel, following",
    [
        ("prefill_select", "\n      ptx::mbarrier_arrive(&sh.full[landed.stage]);\n"),
        ("prefill_select", "\n    sync_item<kMode>();\n"),
        ("rerank", "  // the gathering warps"),
    ],
)
def test_a_missing_proxy_fence_is_noticed(tmp_path, kernel, following):
    if cuda_emulation.find_compiler() is None:
        pytest.skip("no C++ compiler on Linux")
    seen = []

    def edit(text):
        seen.append(FENCE + following in text)
        return text.replace(FENCE + following, following)

    broken = cuda_emulation.build(tmp_path, [kernel], edit)
    assert sum(seen) == 1, "the line is not there any more"
    case = make_case([[3000, 2999]], 16, exact=True)
    heads = random_heads(case, 8)
    broken.configure(3, seed=1)
    with pytest.raises(cuda_emulation.EmulationError, match="proxy fence"):
        if kernel == "rerank":
            candidates = torch.arange(1024, dtype=torch.int32).repeat(2, 1)
            rows, out = case.rows, torch.empty(2, 64, dtype=torch.int32)
            broken.rerank_tokens(
                case.q, case.gates, candidates, case.index_cache, rows.block_table, rows.request, rows.visible, 64, out,
                0, NO_BOUND,
            )  # fmt: skip
        else:
            assert_equals_reference(broken, case, heads, 64)


@pytest.mark.parametrize(
    "following",
    [
        "  choose_bin<kThreads>(p.k",
        "  if (decides_by_few) {\n    if",
        "    for_each_selected([&](uint32_t position) {\n      const",
        "  if (p.k % 4 == 0",
    ],
)
def test_a_missing_barrier_is_noticed(tmp_path, following):
    if cuda_emulation.find_compiler() is None:
        pytest.skip("no C++ compiler on Linux")
    barrier = re.compile(r" *__syncthreads\(\);\n(?=" + re.escape(following) + ")")
    seen = []

    def edit(text):
        edited, count = barrier.subn("", text)
        seen.append(count)
        return edited

    broken = cuda_emulation.build(tmp_path, ["prefill_select"], edit)
    assert sum(seen) == 1, "the line is not there any more"
    case = make_case([[3000 - i for i in range(20)]], 16, exact=True)
    broken.configure(5, seed=64)
    # what is read too early may be a place outside of the kernel's memory
    with pytest.raises((AssertionError, cuda_emulation.EmulationError), match="not equal|not the kernel's"):
        assert_equals_reference(broken, case, random_heads(case, 8), 64)


def test_a_workspace_for_few_rows(tmp_path):
    """Several launches share their thresholds, and the rows that they leave undecided are repaired together."""
    if cuda_emulation.find_compiler() is None:
        pytest.skip("no C++ compiler on Linux")
    constants = {
        "kRegionBytes = 60ll << 20;": "kRegionBytes = 1200ll << 10;",
        "kMaxLaunchRows = 4096;": "kMaxLaunchRows = 256;",
    }
    seen = []

    def edit(text):
        for old, new in constants.items():
            seen.append(old in text)
            text = text.replace(old, new)
        return text

    operators = cuda_emulation.build(tmp_path, ["prefill_select"], edit)
    assert sum(seen) == len(constants), "a constant has another name or value"
    operators.configure(3, seed=1)
    case = make_case([[1500 - i for i in range(150)], [1490] * 30 + [300, 100, 0]], 16, seed=9, exact=True)
    before = operators.launches
    assert_equals_reference(operators, case, random_heads(case, 8), 700)
    assert operators.launches - before == 7, "sample, threshold, twice collect and select, repair"
    negative = case.with_gates(-case.gates.abs() - 0.25)
    assert_equals_reference(operators, negative, random_heads(negative, 8), 700)
