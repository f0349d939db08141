"""What an indexer is asked to do: the options of `misa_vllm.config` resolved against one model."""

from dataclasses import dataclass

STATISTICS = ("mean", "mean_positive")
"""What the router may read of the keys; the first is MISA's."""


class MISAConfigError(Exception):
    """The options, or the model, cannot be served; the message is one line that says what to change.

    Not a ValueError: pydantic would wrap it into several lines where vLLM validates its own configuration.
    """


@dataclass(frozen=True)
class IndexerSettings:
    """The options resolved against one model's indexer."""

    policy: str
    index_heads: int
    """H."""
    topk: int
    """k, the model's index_topk."""
    active_heads: int
    pool_block: int
    candidates: int
    min_context: int
    audit_every: int = 0
    exact_decode: bool = False
    """Whether decode steps leave routing out and select as exact DSA does."""
    statistic: str = STATISTICS[0]
    """Of `STATISTICS`: what the index cache's pages hold, and the router ranks heads by."""
    routes_heads: bool = True
    """Whether the policy routes, and so needs the statistic of each page; one that does not is stock DSA on CUDA."""

    @property
    def route_from(self) -> int:
        """Smallest number of visible tokens at which a query's heads are routed.

        A function of the query's position alone, so that prefill, decode and any batching agree (design,
        invariant 1): the user's `min_context`, one complete pool block, and more tokens than top-k keeps.
        """
        return max(self.min_context, self.pool_block, self.topk + 1)
