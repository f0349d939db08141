"""What the comparison with stock vLLM relies on, against the definition, token by token."""

import random

import torch

from tests.engine.settled import settle


def best(scores, k):
    """The k best positions of a list, of equal scores the earlier ones, ascending."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def test_settled_selections_are_the_earliest_of_the_best():
    rng, k = random.Random(0), 8
    for _ in range(50):
        first = torch.tensor([rng.randrange(20) for _ in range(5)], dtype=torch.int32)
        end = first + torch.tensor([rng.randrange(20) for _ in range(5)], dtype=torch.int32)
        scores = torch.full((5, 40), torch.nan)  # outside of what a row sees there may be anything
        selected, want = torch.full((2, 5, k), -1, dtype=torch.int32)
        for m, (start, stop) in enumerate(zip(first.tolist(), end.tolist(), strict=True)):
            seen = [float(rng.randrange(-3, 4)) for _ in range(start, stop)]
            scores[m, start:stop] = torch.tensor(seen)
            order = list(range(len(seen)))
            rng.shuffle(order)  # ties and order are left open
            order = sorted(order, key=lambda i: -seen[i])[:k]
            rng.shuffle(order)
            selected[m, : len(order)] = torch.tensor(order, dtype=torch.int32)
            want[m, : len(order)] = torch.tensor(best(seen, k), dtype=torch.int32)
        assert settle(scores, first, end, selected) == 0
        assert torch.equal(selected, want)


def test_a_token_that_is_not_among_the_best_is_told():
    """Also one that does not exist; the other rows are settled all the same."""
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0], [3.0, 1.0, 2.0, 0.0], [5.0, 7.0, 6.0, 1.0]])
    first, end = torch.tensor([0, 0, 1], dtype=torch.int32), torch.tensor([4, 4, 4], dtype=torch.int32)
    selected = torch.tensor([[2, 0], [0, 3], [2**31 - 1, 0]], dtype=torch.int32)
    assert settle(scores, first, end, selected) == 2
    assert selected[0].tolist() == [0, 2]
