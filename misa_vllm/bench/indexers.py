"""The indexers that the kernel benchmark compares, stock vLLM's and ours, stage by stage, and whether they agree."""

import argparse
import functools
import importlib
from collections.abc import Callable

import torch

from misa_vllm import reference
from misa_vllm.bench.workload import Case, Inputs, Options
from misa_vllm.index_cache import INDEX_HEAD_DIM
from misa_vllm.kernels import IMPLEMENTATIONS, Kernels
from misa_vllm.policies import IndexerStep, make_policy
from misa_vllm.seam.stock_kernels import StockIndexerKernels
from misa_vllm.settings import IndexerSettings

LEAST_SHARED = 0.999
"""Share of selected tokens that two implementations must have in common: they add the heads in different orders, so
tokens whose scores are equal to some fp32 roundings may change places at the end of the list."""
LEAST_SHARED_HEADS = 0.95
"""The same for routed heads: block means and their products may be rounded to bf16, a part in 256."""
CHECKED_ROWS = 64
"""Rows of the hierarchical selection that are compared."""
ROWS_AT_ONCE = 256


def available_kernels(names: list[str], device: torch.device) -> tuple[dict[str, Kernels], list[str]]:
    """(name -> implementation, one line for each that cannot run on `device`)."""
    available, left_out = {}, []
    for name in names:
        module = importlib.import_module(IMPLEMENTATIONS[name])
        problem = module.why_unavailable(device)
        if problem is None:
            available[name] = module
        else:
            left_out.append(f"{name} kernels left out: {problem}")
    return available, left_out


def settings(policy: str, heads: int, args: argparse.Namespace, min_context: int) -> IndexerSettings:
    """The backend's options for one policy, as given on the command line."""
    sizes = args.k, args.active_heads, args.pool_block, args.candidates
    return IndexerSettings(policy, heads, *sizes, min_context, statistic=args.statistic)


class StockIndexer:
    """vLLM's kernels on the sets of inputs; every method takes the number of the set."""

    def __init__(self, kernels: StockIndexerKernels, case: Case, inputs: list[Inputs], options: Options) -> None:
        self.kernels, self.case, self.inputs, self.k = kernels, case, inputs, options.k
        device = inputs[0].q.device
        self.out = torch.full((case.rows, options.k), reference.NO_TOKEN, dtype=torch.int32, device=device)
        if case.phase == "prefill":
            self.first = torch.zeros(case.rows, dtype=torch.int32, device=device)
            self.starts = torch.tensor([0, case.keys], dtype=torch.int32, device=device)
            self.keys = [
                torch.empty(case.keys, INDEX_HEAD_DIM, dtype=torch.float8_e4m3fn, device=device) for _ in inputs
            ]
            self.scales = [torch.empty(case.keys, 4, dtype=torch.uint8, device=device) for _ in inputs]
            for number in range(len(inputs)):
                self.gather(number)
        else:
            self.schedules = [kernels.decode_schedule(self._visible(one)) for one in inputs]

    def _visible(self, one: Inputs) -> torch.Tensor:
        return one.rows.visible.view(self.case.requests, self.case.rows_each)

    def gather(self, number: int) -> None:
        one = self.inputs[number]
        table = one.rows.block_table
        self.kernels.gather_keys(one.stock_cache, self.keys[number], self.scales[number], table, self.starts)

    def scores(self, number: int, gates: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [M, >= N], by all heads; `gates` replaces the set's."""
        one = self.inputs[number]
        gates = one.gates if gates is None else gates
        if self.case.phase == "prefill":
            keys, scales = self.keys[number], self.scales[number]
            return self.kernels.prefill_scores(one.q, keys, scales, gates, self.first, one.rows.visible)
        return self.kernels.decode_scores(
            one.q, one.stock_cache, gates, self._visible(one), one.rows.block_table, self.schedules[number],
            one.rows.max_visible,
        )  # fmt: skip

    def select(self, number: int, scores: torch.Tensor) -> None:
        one = self.inputs[number]
        if self.case.phase == "prefill":
            self.kernels.prefill_select(scores, self.first, one.rows.visible, self.out, self.k)
        else:
            self.kernels.decode_select(scores, self._visible(one), self.out, self.k, self.case.keys)

    def whole(self, number: int, gates: torch.Tensor | None = None) -> torch.Tensor:
        self.select(number, self.scores(number, gates))
        return self.out

    @property
    def select_name(self) -> str:
        if self.case.phase == "prefill":
            return "per_row"
        return self.kernels.decode_select_name(self.scores(0), self.k)

    def stages(self) -> dict[str, Callable[[int], object]]:
        scored = [self.scores(number) for number in range(len(self.inputs))]
        gather = {"gather": self.gather} if self.case.phase == "prefill" else {}
        top_k = {"top-k": lambda number: self.select(number, scored[number])}
        return {**gather, "scores": self.scores, **top_k, "whole": self.whole}


class OurIndexer:
    """One implementation of `misa_vllm.kernels.Kernels` on the sets of inputs; methods take the number of the set."""

    def __init__(
        self,
        kernels: Kernels,
        case: Case,
        inputs: list[Inputs],
        options: Options,
        args: argparse.Namespace,
        min_context: int,
    ) -> None:
        self.kernels, self.case, self.inputs, self.options = kernels, case, inputs, options
        self.policies = {
            name: make_policy(settings(name, case.heads, args, min_context)) for name in ("misa", "hierarchical")
        }
        self.out = torch.full((case.rows, options.k), reference.NO_TOKEN, dtype=torch.int32, device=inputs[0].q.device)

    @functools.cached_property
    def heads(self) -> list[torch.Tensor]:
        return [self.route(number) for number in range(len(self.inputs))]

    def means(self, number: int) -> None:
        by_signs = self.options.statistic == "mean_positive"
        update = self.kernels.update_signed_means if by_signs else self.kernels.update_page_means
        update(self.inputs[number].index_cache, self.inputs[number].slots)

    def route(self, number: int) -> torch.Tensor:
        one, options = self.inputs[number], self.options
        step = IndexerStep(one.q, one.gates, one.index_cache, one.rows, self.kernels)
        return step.route(options.active_heads, options.pool_block, options.statistic)

    def _select(self, number: int, heads: torch.Tensor | None, k: int, out: torch.Tensor) -> torch.Tensor:
        one = self.inputs[number]
        self.kernels.select_tokens(one.q, one.gates, heads, one.index_cache, one.rows, k, out)
        return out

    def select(self, number: int) -> torch.Tensor:
        return self._select(number, self.heads[number], self.options.k, self.out)

    def exact(self, number: int) -> torch.Tensor:
        return self._select(number, None, self.options.k, self.out)

    def candidates(self, number: int) -> torch.Tensor:
        size = self.options.candidates
        out = torch.full((self.case.rows, size), reference.NO_TOKEN, dtype=torch.int32, device=self.out.device)
        return self._select(number, self.heads[number], size, out)

    def _serve(self, policy: str, number: int) -> torch.Tensor:
        one = self.inputs[number]
        step = IndexerStep(one.q, one.gates, one.index_cache, one.rows, self.kernels)
        self.policies[policy].select(step, self.out)
        return self.out

    def whole(self, number: int) -> torch.Tensor:
        return self._serve("misa", number)

    def hierarchical(self, number: int) -> torch.Tensor:
        return self._serve("hierarchical", number)

    @property
    def has_candidates(self) -> bool:
        """Whether re-ranking leaves anything out; if not, policy hierarchical is exact DSA."""
        return self.case.visible[0] >= self.policies["hierarchical"].route_from

    def workspace_bytes(self) -> int:
        """What vLLM's memory profile counts for policy misa."""
        case = self.case
        size = self.kernels.workspace_bytes(case.rows, case.keys, self.options.k)
        if self.options.statistic == "mean_positive":
            size = max(size, self.kernels.signs_workspace_bytes(case.rows, case.keys))
        return size

    def stages(self) -> dict[str, Callable[[int], object]]:
        stages = {"page means": self.means, "route": self.route, "select": self.select, "whole": self.whole}
        stages["exact"] = self.exact
        if self.has_candidates:
            stages["hierarchical"] = self.hierarchical
        return stages


# ---------------------------------------------------------------- agreement


def shared_tokens(
    ours: torch.Tensor, theirs: torch.Tensor, keys: int, scores: torch.Tensor | None = None
) -> torch.Tensor:
    """Share [M] of the tokens `theirs` [M, k] that are among `ours` [M, k], or replaced there by an equally good one.

    Numbers outside 0 .. keys - 1 are no tokens and count nowhere; a token named twice counts once. `scores`
    [M, >= keys] are those that `theirs` are the best of: of tokens that equal the worst of them, any are right. None:
    only the same tokens are.
    """
    shares = []
    for start in range(0, len(ours), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        mine, other = (_token_mask(tokens[part], keys) for tokens in (ours, theirs))
        shared = (mine & other).sum(1)
        if scores is not None:
            is_last = scores[part, :keys] == scores[part, :keys].masked_fill(~other, torch.inf).amin(1, keepdim=True)
            places = (other & is_last).sum(1)
            shared = (mine & other & ~is_last).sum(1) + (mine & is_last).sum(1).minimum(places)
        shares.append(shared / other.sum(1))
    return torch.cat(shares)


def _token_mask(tokens: torch.Tensor, keys: int) -> torch.Tensor:
    """[M, keys] bool from token numbers [M, k]."""
    mask = torch.zeros(tokens.shape[0], keys + 1, dtype=torch.bool, device=tokens.device)
    mask.scatter_(1, tokens.long().masked_fill((tokens < 0) | (tokens >= keys), keys), True)
    return mask[:, :keys]


def routed_gates(gates: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """gates [M, H] with zeros outside `heads` [M, h]: with them, stock's kernels score by the routed heads alone."""
    return torch.where(_token_mask(heads, gates.shape[1]), gates, 0.0)


def check(ours: OurIndexer, stock: StockIndexer) -> dict[str, float]:
    """What the selections of the first set of inputs share with stock's, and the routed heads with the reference."""
    one, case, options = ours.inputs[0], ours.case, ours.options
    hidden = torch.arange(case.keys, device=one.q.device) >= one.rows.visible.unsqueeze(1)
    found: dict[str, float] = {}

    def compare(name: str, mine: torch.Tensor, theirs: torch.Tensor, scores: torch.Tensor | None = None) -> None:
        share = shared_tokens(mine, theirs, case.keys, scores)
        found[name] = share.mean().item()
        found[f"{name}, least row"] = share.min().item()

    def compare_with_stock(name: str, mine: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        scores = stock.scores(0, gates)
        stock.select(0, scores)
        scores = scores[:, : case.keys].masked_fill(hidden, -torch.inf)
        compare(name, mine, stock.out, scores)
        return scores

    heads = ours.heads[0]
    has_blocks = one.rows.visible >= options.pool_block
    if bool(has_blocks.any()):
        step = IndexerStep(one.q, one.gates, one.index_cache, one.rows, reference)
        wanted = step.route(options.active_heads, options.pool_block, options.statistic)
        found["heads"] = shared_tokens(heads[has_blocks], wanted[has_blocks], case.heads).mean().item()
    selected = ours.select(0).clone()
    compare_with_stock("select", selected, routed_gates(one.gates, heads))
    exact = ours.exact(0).clone()
    scores = compare_with_stock("exact", exact, one.gates)
    is_routed = (one.rows.visible >= options.route_from).unsqueeze(1)
    compare("whole", ours.whole(0), torch.where(is_routed, selected, exact))
    if ours.has_candidates:
        # the last rows: of one request in prefill, of all in decode
        last = slice(-CHECKED_ROWS, None)
        among = scores[last].masked_fill(~_token_mask(ours.candidates(0)[last], case.keys), -torch.inf)
        best = among.topk(options.k).indices.int()
        compare("hierarchical", ours.hierarchical(0)[last], best, among)
    return found


def disagreement(checks: dict[str, float]) -> str | None:
    """The first share that is too small, in words; a share that is not a number is."""
    for name, share in checks.items():
        least = LEAST_SHARED_HEADS if name == "heads" else LEAST_SHARED
        if not name.endswith("least row") and not share >= least:
            other = "the reference's heads" if name == "heads" else "the tokens it must select"
            return f"{name} has {share:.5f} of {other}, expected {least}; not timed"
    return None


def transient_bytes(ours: OurIndexer) -> int:
    """Device memory that one step of policy misa takes beyond its inputs and outputs."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours.whole(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
