"""Random shapes of everything at once; MISA_RANDOM_SHAPES says how many (10,000 take a GPU some minutes).

MISA_FIRST_SHAPE says which is the first, so that several processes can share them."""

import os
import random

import torch

from .cases import DOT_ERROR, assert_best, make_case, random_heads, tokens_of
from .test_route import assert_routed
from .test_select import assert_selected, rerank, select

SHAPES = int(os.environ.get("MISA_RANDOM_SHAPES", "25"))
FIRST = int(os.environ.get("MISA_FIRST_SHAPE", "0"))


def draw_case(rng: random.Random, seed: int, device: str):
    """One to five requests of a few rows each, most of them short."""
    heads = rng.choice([1, 2, 5, 16, 32, 48, 64])
    requests = []
    for _ in range(rng.randint(1, 5)):
        length = rng.randint(0, rng.choice([3, 70, 300, 1200]))
        requests.append([max(0, length - rng.randint(0, length)) for _ in range(rng.choice([1, 2, 4, 20]))])
    return make_case(requests, heads, seed=seed, device=device)


def test_random_shapes(subject):
    for seed in range(FIRST, FIRST + SHAPES):
        rng = random.Random(seed)
        case = draw_case(rng, seed, subject.device)
        all_heads = case.q.shape[1]
        k = rng.choice([1, 3, 64, 127, 200])
        active_heads = rng.randint(1, all_heads)
        pool_block = 64 * rng.choice([1, 2, 5])
        try:
            routed = subject.kernels.route_heads(
                case.q, case.gates, case.index_cache, case.rows, active_heads, pool_block
            )
            assert_routed(subject, case, routed.cpu(), pool_block)
            heads = random_heads(case, active_heads, seed)
            selected = select(subject, case, heads, k)
            assert_selected(subject, case, heads, selected, k)
            assert torch.equal(select(subject, case, heads, k), selected), "another run gave other tokens"
            wide = select(subject, case, heads, 2 * k)
            reranked = rerank(subject, case, wide.to(subject.device), k)
            for m in range(len(case)):
                tokens = sorted(tokens_of(wide[m]))
                scores, tolerance = case.scores(m, None, DOT_ERROR[subject.name])
                chosen = [tokens.index(token) for token in tokens_of(reranked[m])] if tokens else []
                assert_best(scores[tokens], tolerance[tokens], chosen, k, f"row {m}, re-ranked")
        except (AssertionError, ValueError, RuntimeError) as error:
            raise AssertionError(f"seed {seed}, {len(case)} rows, {all_heads} heads, k {k}") from error
