"""What a router may read of the keys instead of block means, in fp32 torch, for evaluation.

The backend's option `statistic` serves two of them: `mean`, and `mean_positive` from page means in float16.

A statistic ranks the H heads of M queries. Its arguments are q [M, H, D] and gates [M, H] float32, the dequantised
index keys [N, D] of one request, visible [M] (how many keys a query sees) and pool_block, the tokens in a block. It
returns S [M, H] float32, of which the router keeps the largest; only blocks that are complete at a query count, so it
is a function of the query's prefix as MISA's own is.

With w a head's gate and b the blocks, MISA's router (arXiv 2605.07363) is S = |w| sum_b relu(q . mean_b). What a head
adds to the scores is |w| sum_s relu(q . k_s), which `oracle` computes and the others estimate from blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from misa_vllm.reference import router_scores


@dataclass(frozen=True)
class Statistic:
    scores: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
    """(q, gates, keys, visible, pool_block) -> S."""
    vectors: int | None
    """How many vectors of D a block leaves for the router to read; None: all its keys."""


def _blocks(keys: torch.Tensor, pool_block: int) -> torch.Tensor:
    """The complete blocks, [blocks, pool_block, D]."""
    count = keys.shape[0] // pool_block
    return keys[: count * pool_block].unflatten(0, (count, pool_block))


def mean(q, gates, keys, visible, pool_block: int) -> torch.Tensor:
    """MISA's: S = |w| sum_b relu(q . mean of the keys of b)."""
    return router_scores(q, gates, _blocks(keys, pool_block).mean(dim=1), visible // pool_block)


def mean_max(q, gates, keys, visible, pool_block: int) -> torch.Tensor:
    """S = |w| sum_b (relu(q . mean_b) + relu(q . max_b)) / 2, max_b the largest value of each dimension in b."""
    blocks = _blocks(keys, pool_block)
    of_mean = router_scores(q, gates, blocks.mean(dim=1), visible // pool_block)
    return (of_mean + router_scores(q, gates, blocks.amax(dim=1), visible // pool_block)) / 2


def mean_positive(q, gates, keys, visible, pool_block: int) -> torch.Tensor:
    """S = |w| sum_b (relu(q) . mean of relu(k) + relu(-q) . mean of relu(-k)), means over the keys k of the block.

    Where relu(q . mean) is at most the block's mean of relu(q . k), by convexity, this is at least that mean: it
    adds up the positive products of the single dimensions. It is linear in the means, so the pool block only
    decides how many of the newest keys are left out.
    """
    blocks = _blocks(keys, pool_block)
    signs = torch.cat([blocks.relu().mean(dim=1), (-blocks).relu().mean(dim=1)], dim=-1)
    return router_scores(torch.cat([q.relu(), (-q).relu()], dim=-1), gates, signs, visible // pool_block)


def oracle(q, gates, keys, visible, pool_block: int) -> torch.Tensor:
    """S = |w| sum over the visible keys of relu(q . k): no block statistic knows more, and it costs what DSA costs."""
    hidden = torch.arange(keys.shape[0], device=keys.device) >= visible.unsqueeze(1)
    sums = [(q[:, head] @ keys.T).relu().masked_fill(hidden, 0.0).sum(dim=1) for head in range(q.shape[1])]
    return gates.abs() * torch.stack(sums, dim=1)


STATISTICS = {
    "mean": Statistic(mean, 1),
    "mean_max": Statistic(mean_max, 2),
    "mean_positive": Statistic(mean_positive, 2),
    "oracle": Statistic(oracle, None),
}
SERVED = "mean"
"""MISA's own, and the default of the option; it is evaluated by the kernels that serve it."""
