"""`select_tokens` and `rerank_tokens` of every implementation."""

import pytest
import torch

from misa_vllm import reference
from misa_vllm.policies import IndexerStep

from .cases import DOT_ERROR, NEAR_PAGES, assert_best, make_case, random_heads, stock_pages, tokens_of

K = 128
UNTOUCHED = -7
LENGTHS = [[*NEAR_PAGES, K - 1, K, K + 1], [319, 320, 321, 383, 384, 385], [700, 200, 1], [129]]


def select(subject, case, heads, k=K, **bounds):
    out = torch.full((len(case), k + 3), UNTOUCHED, dtype=torch.int32, device=subject.device)
    subject.kernels.select_tokens(case.q, case.gates, heads, case.index_cache, case.rows, k, out, **bounds)
    assert (out[:, k:] == UNTOUCHED).all(), "wrote past the k-th column"
    return out[:, :k].cpu()


def rerank(subject, case, candidates, k=K, **bounds):
    out = torch.full((len(case), k), UNTOUCHED, dtype=torch.int32, device=subject.device)
    subject.kernels.rerank_tokens(case.q, case.gates, candidates, case.index_cache, case.rows, k, out, **bounds)
    return out.cpu()


def assert_selected(subject, case, heads, selected, k=K):
    for m in range(len(case)):
        scores, tolerance = case.scores(m, heads, DOT_ERROR[subject.name])
        assert_best(scores, tolerance, tokens_of(selected[m]), k, f"row {m}")


@pytest.mark.parametrize(
    "all_heads, active_heads",
    [(64, None), (32, None), (64, 1), (64, 2), (32, 4), (64, 8), (32, 8), (64, 16), (32, 32), (64, 64)],
)
def test_selects_the_best_tokens(subject, all_heads, active_heads):
    case = make_case(LENGTHS, all_heads, device=subject.device)
    heads = None if active_heads is None else random_heads(case, active_heads)
    selected = select(subject, case, heads)
    assert_selected(subject, case, heads, selected)


@pytest.mark.parametrize("k", [1, 2, 64, 200, 699, 700])
def test_any_k(subject, k):
    case = make_case([[700, 640], [65, 1, 0]], device=subject.device)
    heads = random_heads(case, 8)
    assert_selected(subject, case, heads, select(subject, case, heads, k), k)


def test_long_context_at_the_models_k(subject):
    """Long enough for a selection that starts from a sample of the scores."""
    case = make_case([[12345, 9000, 2049, 2048]], device=subject.device)
    heads = random_heads(case, 8)
    assert_selected(subject, case, heads, select(subject, case, heads, 2048), 2048)


def test_pages_without_room_for_means(subject):
    case = make_case(LENGTHS, device=subject.device)
    heads = random_heads(case, 8)
    whole = select(subject, case, heads)
    case.index_cache = stock_pages(case.index_cache)
    assert torch.equal(select(subject, case, heads), whole)


@pytest.mark.parametrize("gates", ["mixed", "negative", "zero", "zero queries"])
def test_exact_scores(subject, gates):
    """Scores that fp32 holds exactly, most of them shared by several tokens."""
    case = make_case(LENGTHS, 32, exact=True, device=subject.device)
    if gates == "negative":
        case = case.with_gates(-case.gates.abs() - 0.25)
    elif gates == "zero":
        case = case.with_gates(torch.zeros_like(case.gates))
    elif gates == "zero queries":
        case.q = torch.zeros_like(case.q)
    heads = random_heads(case, 8)
    selected = select(subject, case, heads)
    for m in range(len(case)):
        scores, _ = case.scores(m, heads, 0.0)
        assert_best(scores, torch.zeros_like(scores), tokens_of(selected[m]), K, f"row {m}")
    if subject.name == "cpu":  # the earlier token wins
        want = torch.full_like(selected, UNTOUCHED)
        reference.select_tokens(case.q, case.gates, heads, case.index_cache, case.rows, K, want)
        assert torch.equal(selected, want)


def test_gates_of_all_magnitudes(subject):
    case = make_case(LENGTHS, device=subject.device)
    exponents = torch.linspace(-15, 15, case.gates.shape[1], device=subject.device)
    case = case.with_gates(case.gates.sign() * 10.0**exponents)
    for heads in (None, random_heads(case, 8)):
        assert_selected(subject, case, heads, select(subject, case, heads))


@pytest.mark.parametrize("lengths", [LENGTHS, [[9000, 8999]]], ids=["short", "thousands of equal scores"])
@pytest.mark.parametrize("gate", [torch.inf, -torch.inf, torch.nan])
def test_scores_that_are_not_finite(subject, gate, lengths):
    """Scores are infinite or NaN (an infinite gate on a zero dot product): a valid, repeatable selection."""
    case = make_case(lengths, 32, exact=True, device=subject.device)
    gates = case.gates.clone()
    gates[::2, 3] = gate
    case = case.with_gates(gates)
    selected = select(subject, case, None)
    assert torch.equal(select(subject, case, None), selected)
    for m in range(len(case)):
        tokens = tokens_of(selected[m])
        visible = int(case.rows.visible[m])
        assert len(set(tokens)) == len(tokens) == min(K, visible) and all(token < visible for token in tokens)
    if subject.name == "cpu":  # NaN counts as the largest score, as in torch.sort
        want = torch.full_like(selected, UNTOUCHED)
        reference.select_tokens(case.q, case.gates, None, case.index_cache, case.rows, K, want)
        assert torch.equal(selected, want)


@pytest.mark.parametrize("visible_from, visible_to", [(0, 65), (65, 321), (129, None), (10_000, None), (0, 0)])
def test_other_rows_are_untouched(subject, visible_from, visible_to):
    case = make_case(LENGTHS, device=subject.device)
    everything = select(subject, case, None)
    selected = select(subject, case, None, visible_from=visible_from, visible_to=visible_to)
    visible = case.rows.visible.cpu()
    taken = (visible >= visible_from) & (visible < (visible_to if visible_to is not None else 2**30))
    assert torch.equal(selected[taken], everything[taken])
    assert (selected[~taken] == UNTOUCHED).all()


def test_rows_alone_and_reruns_select_the_same(subject):
    case = make_case(LENGTHS, device=subject.device)
    heads = random_heads(case, 8)
    batch = select(subject, case, heads)
    assert torch.equal(select(subject, case, heads), batch)
    for m in range(len(case)):
        alone = select(subject, case.row(m), heads[m : m + 1])
        assert torch.equal(alone[0], batch[m]), f"row {m}"


def test_no_rows(subject):
    case = make_case([[65], [1]], device=subject.device)
    case.q, case.gates, case.rows = case.q[:0], case.gates[:0], case.rows[:0]
    assert select(subject, case, None).shape == (0, K)


@pytest.mark.parametrize("lengths", [[[17_000, 16_999], [4096], [300, 65, 0]], [[6000]], [[300], [1100, 1101], [2048]]])
@pytest.mark.parametrize("pool_block", [64, 1024])
def test_routing_and_selecting_at_once(subject, lengths, pool_block):
    """The same tokens as in two calls, every time, also from a captured graph."""
    case = make_case(lengths, device=subject.device)
    step = IndexerStep(case.q, case.gates, case.index_cache, case.rows, subject.kernels)
    first = max(K + 1, pool_block)
    want = select(subject, case, step.route(8, pool_block), visible_from=first)
    out = torch.empty(len(case), K, dtype=torch.int32, device=subject.device)

    def run():
        step.route_and_select(8, pool_block, K, out, visible_from=first)

    runs = [run]
    if subject.device == "cuda":
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        runs += [run, graph.replay] * 50
    for again in runs:
        out.fill_(UNTOUCHED)
        again()
        assert torch.equal(out.cpu(), want)


# ---------------------------------------------------------------- re-ranking


def make_candidates(case, count, seed=0):
    """Random distinct visible tokens in random order, [M, count] int32; every third entry of a row may be -1."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.full((len(case), count), reference.NO_TOKEN, dtype=torch.int32)
    for m, visible in enumerate(case.rows.visible.tolist()):
        tokens = torch.randperm(visible, generator=generator)[: count - count // 3]
        columns = torch.randperm(count, generator=generator)[: len(tokens)]
        out[m, columns] = tokens.to(torch.int32)
    return out.to(case.q.device)


@pytest.mark.parametrize("all_heads, count", [(64, 384), (32, 200), (64, 128)])
def test_reranks_the_candidates(subject, all_heads, count):
    case = make_case(LENGTHS, all_heads, device=subject.device)
    candidates = make_candidates(case, count)
    selected = rerank(subject, case, candidates)
    assert torch.equal(rerank(subject, case, candidates), selected)
    for m in range(len(case)):
        if int(case.rows.visible[m]) == 0:
            continue  # padding: nothing is promised
        tokens = tokens_of(candidates[m].cpu())
        scores, tolerance = case.scores(m, None, DOT_ERROR[subject.name])
        place = {token: i for i, token in enumerate(tokens)}
        assert set(tokens_of(selected[m])) <= set(tokens), f"row {m}: selected a token that is no candidate"
        chosen = [place[token] for token in tokens_of(selected[m])]
        assert_best(scores[tokens], tolerance[tokens], chosen, K, f"row {m}")


def test_reranking_all_tokens_is_dsa(subject):
    case = make_case([[700, 640, 385]], 32, exact=True, device=subject.device)
    everything = torch.arange(700, device=subject.device).repeat(len(case), 1)
    candidates = everything.masked_fill(everything >= case.rows.visible.unsqueeze(1), reference.NO_TOKEN)
    reranked = rerank(subject, case, candidates.to(torch.int32))
    selected = select(subject, case, None)
    for m in range(len(case)):
        scores, _ = case.scores(m, None, 0.0)
        assert sorted(scores[tokens_of(reranked[m])]) == sorted(scores[tokens_of(selected[m])])


def test_rerank_leaves_other_rows(subject):
    case = make_case(LENGTHS, device=subject.device)
    candidates = make_candidates(case, 200)
    selected = rerank(subject, case, candidates, visible_from=129, visible_to=385)
    visible = case.rows.visible.cpu()
    taken = (visible >= 129) & (visible < 385)
    assert torch.equal(selected[taken], rerank(subject, case, candidates)[taken])
    assert (selected[~taken] == UNTOUCHED).all()
