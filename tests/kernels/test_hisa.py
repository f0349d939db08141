"""Policy hisa on every implementation of the kernels: which blocks it keeps, and what it selects in them."""

from types import SimpleNamespace

import pytest
import torch

from misa_vllm import reference
from misa_vllm.config import resolve_settings
from misa_vllm.index_cache import INDEX_HEAD_DIM
from misa_vllm.policies import IndexerStep, hisa, make_policy
from misa_vllm.settings import MISAConfigError

from .cases import DOT_ERROR, assert_best, make_case, tokens_of

TOPK = 40
BLOCKS = 3
CANDIDATES = BLOCKS * hisa.BLOCK
# below, at and past what the blocks hold; at, before and behind the ends of pages and of blocks
VISIBLE = [
    [0, 1, TOPK, CANDIDATES, CANDIDATES + 1, 511, 512, 513, 576, 640],
    [CANDIDATES + 1, 1100],
    [],
    [63, 0],
    [897, 896, 1024, 1025],
]


def policy_of(case, **options):
    model = SimpleNamespace(index_n_heads=case.q.shape[1], index_topk=TOPK, index_head_dim=INDEX_HEAD_DIM)
    return make_policy(resolve_settings({"policy": "hisa", "candidates": CANDIDATES, **options}, model))


def select(case, kernels, k=TOPK, **options):
    out = torch.full((len(case), k + 3), -7, dtype=torch.int32, device=case.q.device)
    policy_of(case, **options).select(IndexerStep(case.q, case.gates, case.index_cache, case.rows, kernels), out)
    assert (out[:, k:] == -7).all(), "columns past k were written"
    return out[:, :k]


def block_scores(case, m):
    """Of row m: all-head scores of the means of the blocks between the first and the newest, and their tolerance."""
    visible = int(case.rows.visible[m])
    keys = case.keys[int(case.rows.request[m])][: (visible - 1) // hisa.BLOCK * hisa.BLOCK]
    kbar = keys.unflatten(0, (-1, hisa.BLOCK)).mean(dim=1)[1:]
    q, gates = case.q[m].cpu().double(), case.gates[m].cpu().double()
    magnitude = keys.abs().unflatten(0, (-1, hisa.BLOCK)).mean(dim=1)[1:]
    # fp32: at most 128 roundings in a mean, 128 in a dot product, one for each head
    error = (2 * hisa.BLOCK + len(gates)) * 2.0**-24
    return gates @ (q @ kbar.T).relu(), gates.abs() @ (q.abs() @ magnitude.T) * error


@pytest.mark.parametrize("heads", [8, 64])
def test_selects_the_best_tokens_of_the_best_blocks(subject, heads):
    case = make_case(VISIBLE, heads=heads, seed=heads, device=subject.device)
    selected = select(case, subject.kernels)
    for m in range(len(case)):
        visible, chosen = int(case.rows.visible[m]), tokens_of(selected[m])
        scores, tolerance = case.scores(m, None, DOT_ERROR[subject.name])
        if visible <= CANDIDATES:
            assert_best(scores, tolerance, chosen, TOPK, f"row {m}, which sees {visible} keys")
            continue
        middle, error = block_scores(case, m)
        order = middle.argsort(descending=True)
        inside, outside = order[: BLOCKS - 2], order[BLOCKS - 2 :]
        gap = middle[inside].min() - middle[outside].max()
        assert gap > 2 * error.max(), "this case cannot tell which block is better: choose another seed"
        newest = (visible - 1) // hisa.BLOCK
        kept = [0, newest, *(inside + 1).tolist()]
        tokens = [s for b in sorted(kept) for s in range(b * hisa.BLOCK, min((b + 1) * hisa.BLOCK, visible))]
        positions = {token: i for i, token in enumerate(tokens)}
        assert set(chosen) <= set(tokens), f"row {m} of {visible} selects outside of the blocks {kept}"
        assert_best(scores[tokens], tolerance[tokens], [positions[s] for s in chosen], TOPK, f"row {m} of {visible}")


def test_is_the_references_hisa(cpu_kernels):
    case = make_case(VISIBLE, seed=7)
    selected = select(case, cpu_kernels)
    for m in range(len(case)):
        visible = int(case.rows.visible[m])
        keys = case.keys[int(case.rows.request[m])][:visible].float()
        row = case.q[m : m + 1].float(), case.gates[m : m + 1], keys, case.rows.visible[m : m + 1]
        (wanted,) = reference.hisa(*row, TOPK, hisa.BLOCK, BLOCKS)
        assert set(tokens_of(selected[m])) == set(tokens_of(wanted)), f"row {m}, which sees {visible} keys"


def test_a_row_alone_selects_what_it_does_in_a_batch(cpu_kernels, monkeypatch):
    case = make_case(VISIBLE, seed=7)
    together = select(case, cpu_kernels)
    alone = torch.cat([select(case.row(m), cpu_kernels) for m in range(len(case))])
    assert torch.equal(alone, together)
    monkeypatch.setattr(hisa, "WORKSPACE", 2**17)  # a few rows at once
    assert torch.equal(select(case, cpu_kernels), together)


def test_blocks_for_every_token_are_dsa(cpu_kernels):
    case = make_case(VISIBLE, seed=3)
    exact = torch.full((len(case), TOPK), -1, dtype=torch.int32)
    cpu_kernels.select_tokens(case.q, case.gates, None, case.index_cache, case.rows, TOPK, exact)
    assert torch.equal(select(case, cpu_kernels, candidates=9 * hisa.BLOCK), exact)
    assert torch.equal(select(case, cpu_kernels, min_context=1101), exact)
    assert not torch.equal(select(case, cpu_kernels), exact)


def test_few_candidates_are_refused():
    case = make_case([[1]], heads=8)
    for candidates in (hisa.BLOCK, 3 * hisa.BLOCK + 64):
        with pytest.raises(MISAConfigError, match=f"candidates={candidates} are not two or more whole blocks"):
            policy_of(case, candidates=candidates)
