"""The interface of a policy."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from misa_vllm.kernels import Kernels
from misa_vllm.rows import QueryRows
from misa_vllm.settings import STATISTICS, IndexerSettings


@dataclass(frozen=True)
class IndexerStep:
    """One layer's indexer input for M query rows; the keys of this step are in the cache already."""

    q: torch.Tensor
    """[M, H, 128] float8_e4m3fn."""
    gates: torch.Tensor
    """[M, H] float32, the query's FP8 scale, 128^-1/2 and H^-1/2 folded in."""
    index_cache: torch.Tensor
    """[num_pages, page_bytes] uint8, see `misa_vllm.index_cache`."""
    rows: QueryRows
    kernels: Kernels

    def route(self, active_heads: int, pool_block: int, statistic: str = "mean") -> torch.Tensor:
        """The routed heads of every row, [M, h] int32, by the statistic that the cache's pages hold."""
        by = self.kernels.route_heads if statistic == "mean" else self.kernels.route_heads_by_signs
        return by(self.q, self.gates, self.index_cache, self.rows, active_heads, pool_block)

    def route_and_select(
        self,
        active_heads: int,
        pool_block: int,
        k: int,
        out: torch.Tensor,
        visible_from: int = 0,
        statistic: str = "mean",
    ) -> None:
        """Select k tokens by the score of the routed heads for the rows with visible_from <= visible."""
        if self.rows.max_visible < visible_from:
            return
        # one launch for both knows block means only
        together = getattr(self.kernels, "route_and_select", None) if statistic == "mean" else None
        if together is None:
            self.select(self.route(active_heads, pool_block, statistic), k, out, visible_from=visible_from)
        else:
            together(
                self.q, self.gates, self.index_cache, self.rows, active_heads, pool_block, k, out, visible_from
            )

    def select(
        self,
        heads: torch.Tensor | None,
        k: int,
        out: torch.Tensor,
        visible_from: int = 0,
        visible_to: int | None = None,
    ) -> None:
        """Select k tokens by the score of `heads` for the rows with visible_from <= visible < visible_to."""
        if visible_to is not None and self.rows.min_visible >= visible_to:
            return
        if self.rows.max_visible < visible_from:
            return
        self.kernels.select_tokens(
            self.q, self.gates, heads, self.index_cache, self.rows, k, out, visible_from, visible_to
        )


class Policy(ABC):
    """Selects the tokens that sparse attention reads."""

    routes_heads: ClassVar[bool] = True
    """Whether the policy routes heads, and so needs the pages' statistic kept current."""

    statistics: ClassVar[tuple[str, ...]] = STATISTICS[:1]
    """What the policy can read of the keys, names in `misa_vllm.settings.STATISTICS`."""

    def __init__(self, settings: IndexerSettings) -> None:
        self.settings = settings

    @classmethod
    def default_min_context(cls, index_heads: int, candidates: int) -> int:
        """`min_context` where the user gives none: the number of visible tokens up to which exact DSA is as fast."""
        return 0

    @classmethod
    def check(cls, settings: IndexerSettings) -> None:
        """Raise MISAConfigError, one line that says what to change, where the policy cannot run under `settings`."""

    @property
    def widest_selection(self) -> int:
        """The most tokens that one selection of this policy keeps per row."""
        return self.settings.topk

    def workspace_bytes(self, max_rows: int) -> int:
        """Device memory that `select` holds for at most `max_rows` rows, besides what the kernels take."""
        return 0

    @abstractmethod
    def select(self, step: IndexerStep, out: torch.Tensor) -> None:
        """Write every row's selected positions into out[:, :k], int32, -1 for none."""
