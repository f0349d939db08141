"""The operations a policy is made of, and the one place that chooses who computes them.

`Kernels` is the contract; four modules implement it under the same function names:

    misa_vllm.kernels.cuda    C++ for Hopper, csrc/cuda
    misa_vllm.kernels.triton  Triton, any GPU with FP8
    misa_vllm.kernels.cpu     C++ for CPUs, csrc/cpu
    misa_vllm.reference       fp32 torch, any device
"""

import functools
import importlib
import os
from typing import Protocol

import torch

from misa_vllm.log import logger
from misa_vllm.rows import QueryRows

IMPLEMENTATIONS = {
    "cuda": "misa_vllm.kernels.cuda",
    "triton": "misa_vllm.kernels.triton",
    "cpu": "misa_vllm.kernels.cpu",
    "reference": "misa_vllm.reference",
}
"""Name -> module. Each but the reference has `why_unavailable(device) -> str | None`."""

FASTEST_FIRST = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
"""Device type -> names of the implementations that can run on it."""

OVERRIDE_VARIABLE = "MISA_KERNELS"


class Kernels(Protocol):
    """Indexer operations over the paged cache of index keys (`misa_vllm.index_cache`).

    Shapes: M rows (query tokens), H heads, h routed heads. All tensors lie on one device; q is
    float8_e4m3fn [M, H, 128], gates float32 [M, H], index_cache uint8 [num_pages, page_bytes].

    A row takes part in a call if `visible_from <= visible < visible_to` (None: no bound); every other row of
    the output keeps what it held. Nothing here synchronises with the host, and pages that no row may see are
    never read: they may hold NaN, and the unused part of a block table may hold any number.

    An implementation may have `route_and_select(q, gates, index_cache, rows, active_heads, pool_block, k, out,
    visible_from)` as well, which is `select_tokens` by the heads of `route_heads`; where there is none,
    `IndexerStep.route_and_select` calls the two.
    """

    @staticmethod
    def address_rows(
        starts: torch.Tensor, lengths: torch.Tensor, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`QueryRows.request` and `QueryRows.visible` of a step's tokens, [tokens] int32 each.

        starts [R + 1] int32: request r's tokens are starts[r] .. starts[r + 1] - 1, the last of which sees all of its
        lengths[r] [R] int32 keys, the one before one key less, and so on. Tokens behind the last start are padding:
        they see nothing.
        """

    @staticmethod
    def update_page_means(index_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Recompute the mean of every page that this step wrote to, from the page's keys.

        slot_mapping [T] int64: the slots (page * 64 + offset) the step wrote, in token order; negative values
        are padding. A page's keys are those up to the last slot the step wrote in it; the slots of one page
        are adjacent in `slot_mapping`.
        """

    @staticmethod
    def route_heads(
        q: torch.Tensor,
        gates: torch.Tensor,
        index_cache: torch.Tensor,
        rows: QueryRows,
        active_heads: int,
        pool_block: int,
    ) -> torch.Tensor:
        """The routed heads A(t) of every row (MISA, eq. of the router): [M, h] int32, ascending.

        Only pool blocks that are complete at the row's position count; of equal heads the lower wins. A row
        with no complete block gets heads 0 .. h - 1 and must not be scored with them.
        """

    @staticmethod
    def update_signed_means(index_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """`update_page_means` for a cache whose statistic is mean_positive (`index_cache.signed_means_view`)."""

    @staticmethod
    def route_heads_by_signs(
        q: torch.Tensor,
        gates: torch.Tensor,
        index_cache: torch.Tensor,
        rows: QueryRows,
        active_heads: int,
        pool_block: int,
    ) -> torch.Tensor:
        """`route_heads` by the statistic mean_positive, from a cache that holds it: [M, h] int32, ascending."""

    @staticmethod
    def select_tokens(
        q: torch.Tensor,
        gates: torch.Tensor,
        heads: torch.Tensor | None,
        index_cache: torch.Tensor,
        rows: QueryRows,
        k: int,
        out: torch.Tensor,
        visible_from: int = 0,
        visible_to: int | None = None,
    ) -> None:
        """Write each row's k best tokens into out[:, :k] (int32 positions within the request, -1: none).

        Scores are sum over `heads` (None: all) of gate * relu(q . k). A row with at most k visible tokens
        selects them all without scoring, so it is exact whatever `heads` says; a row with none gets -1. The
        order within a row is the implementation's, the same for the same inputs.
        """

    @staticmethod
    def rerank_tokens(
        q: torch.Tensor,
        gates: torch.Tensor,
        candidates: torch.Tensor,
        index_cache: torch.Tensor,
        rows: QueryRows,
        k: int,
        out: torch.Tensor,
        visible_from: int = 0,
        visible_to: int | None = None,
    ) -> None:
        """Write the k best of each row's candidates by the score of all heads into out[:, :k].

        candidates [M, C] int32: distinct visible positions in any order, -1 for none, C >= k. A row with at
        most k candidates selects them all.
        """

    @staticmethod
    def workspace_bytes(max_rows: int, max_visible: int, k: int) -> int:
        """Device memory that the calls of one step hold at once, at most (GPU implementations)."""

    @staticmethod
    def signs_workspace_bytes(max_rows: int, max_visible: int) -> int:
        """Device memory that `route_heads_by_signs` holds, at most (GPU implementations)."""


@functools.cache
def choose_kernels(device_type: str) -> Kernels:
    """The fastest implementation that runs on `device_type` ("cuda" or "cpu"), logged once.

    The environment variable MISA_KERNELS names one explicitly.

    Raises:
        ValueError: MISA_KERNELS names an unknown implementation, or one that cannot run here.
    """
    names = FASTEST_FIRST[device_type]
    wanted = os.environ.get(OVERRIDE_VARIABLE)
    if wanted is not None and wanted not in names:
        raise ValueError(f"{OVERRIDE_VARIABLE}={wanted} does not run on {device_type}: choose {' or '.join(names)}")
    passed_over = []
    for name in names if wanted is None else (wanted,):
        module = importlib.import_module(IMPLEMENTATIONS[name])
        problem = None if name == "reference" else module.why_unavailable(torch.device(device_type))
        if problem is not None:
            passed_over.append(f"{name} kernels: {problem}")
        elif name == "reference" and wanted is None:
            logger.warning("MISA runs its slow torch reference on %s. %s", device_type, "; ".join(passed_over))
            return module
        else:
            note = f" ({'; '.join(passed_over)})" if passed_over else ""
            logger.info("MISA indexer kernels on %s: %s%s.", device_type, name, note)
            return module
    raise ValueError(f"{OVERRIDE_VARIABLE}={wanted} cannot run: {passed_over[-1]}")
