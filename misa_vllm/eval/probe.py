"""The worker's half of `misa-eval recall`: selects with every variant from the queries of one DSA pass.

vLLM adds `RecallProbe` to its worker class; the tool calls the two methods on all workers. One prompt is in flight at
a time. A layer's sampled queries are kept until the last has been computed, then all variants select for them from the
layer's keys, as they are in the cache.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from misa_vllm import metrics, reference
from misa_vllm.eval.statistics import SERVED, STATISTICS, Statistic
from misa_vllm.index_cache import PAGE_BYTES, PAGE_TOKENS, STOCK_PAGE_BYTES
from misa_vllm.kernels import Kernels
from misa_vllm.policies import POLICIES, IndexerStep, make_policy
from misa_vllm.rows import QueryRows
from misa_vllm.seam.observe import AttentionStep, DSALayer, dsa_layers, watch_attention
from misa_vllm.settings import IndexerSettings

ROWS_AT_ONCE = 256
"""Queries evaluated together: bounds the score and probability matrices, 128 MiB each at 131072 keys."""
WIDE_CANDIDATES, WIDE_ROWS = 16384, 16
"""With more candidates than this, so few queries at a time: the CUDA kernel holds a row's candidates on the chip, and
spreads a row over several multiprocessors only where rows are few."""
LOGITS_BYTES = 512 * 2**20
"""Attention logits and their softmax held at once, at least one query's."""


@dataclass(frozen=True)
class Variant:
    """A way to select tokens that is compared with exact DSA."""

    policy: str
    """Name in `POLICIES`."""
    active_heads: int | None = None
    """h; of policy hisa, the MISA whose cost its candidates match, if any."""
    pool_block: int | None = None
    candidates: int | None = None
    statistic: str | None = None
    """Name in `STATISTICS`, for policies that route heads."""

    def settings(self, of_model: IndexerSettings) -> IndexerSettings:
        """The model's settings with this variant's options; heads are routed wherever they can be."""
        given = {name: value for name, value in vars(self).items() if value is not None and name != "statistic"}
        # the oracle reads no blocks: the smallest pool block lets it route from the first query that leaves tokens out
        return replace(
            of_model,
            **{"pool_block": PAGE_TOKENS, **given},
            min_context=0,
            audit_every=0,
            routes_heads=POLICIES[self.policy].routes_heads,
        )

    @property
    def routing(self) -> tuple[int | None, int | None, str | None]:
        """What the routed heads depend on."""
        return self.active_heads, self.pool_block, self.statistic


class RoutedBy:
    """`Kernels` whose router ranks the heads of one set of rows by another statistic."""

    route_and_select = None
    """The kernels' own would route by their own statistic."""

    def __init__(self, kernels: Kernels, scores: Callable[[int], torch.Tensor]) -> None:
        self._kernels = kernels
        self._scores = scores

    def route_heads(self, q, gates, index_cache, rows, active_heads: int, pool_block: int) -> torch.Tensor:
        """As `Kernels.route_heads`."""
        return reference.top_heads(self._scores(pool_block), active_heads)

    def __getattr__(self, name: str):
        return getattr(self._kernels, name)


# ---------------------------------------------------------------- what is measured


def private_cache(step: IndexerStep, count: int) -> torch.Tensor:
    """The first `count` keys of the first request in pages of their own, in order, with their means.

    Under policy dsa the engine's pages have no room for means. Returns uint8 [pages, PAGE_BYTES].
    """
    pages = step.rows.block_table[0, : -(-count // PAGE_TOKENS)].long()
    own = torch.zeros(len(pages), PAGE_BYTES, dtype=torch.uint8, device=step.index_cache.device)
    own[:, :STOCK_PAGE_BYTES] = step.index_cache[:, :STOCK_PAGE_BYTES][pages]
    step.kernels.update_page_means(own, torch.arange(count, device=own.device))
    return own


def attention_mass(q: torch.Tensor, latents: torch.Tensor, visible: torch.Tensor, scale: float) -> torch.Tensor:
    """Full attention's probability of each key, summed over the heads, [M, N] float32.

    q [M, heads, width], latents [N, width] (kv_lora_rank + rope), visible [M]: a row attends to the keys before it.
    """
    latents = latents.float()
    hidden = torch.arange(len(latents), device=latents.device) >= visible.unsqueeze(1)
    out = torch.empty(len(q), len(latents), device=latents.device)
    at_once = max(1, LOGITS_BYTES // (2 * torch.float32.itemsize * q.shape[1] * len(latents)))
    for part in _parts(len(q), at_once):
        logits = (q[part].float() @ latents.T).mul_(scale).masked_fill_(hidden[part].unsqueeze(1), -torch.inf)
        out[part] = logits.softmax(dim=-1).sum(dim=1)
    return out


def held(mass: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """The mass [M, N] of each row's `selected` tokens [M, k] (-1: none), [M]."""
    return mass.gather(1, selected.clamp(min=0).long()).masked_fill(selected < 0, 0.0).sum(dim=1)


@dataclass
class LayerResult:
    """One layer's figures of n queries; lists run over the plan's variants, then over the queries."""

    recall: list[list[float]]
    engine_recall: list[float]
    """Of what the engine itself selected (policy dsa)."""
    mass: list[list[float]] | None
    """Attention mass of the selected tokens, summed over this rank's heads; None where it cannot be read."""
    dsa_mass: list[float] | None
    routed: dict[tuple, tuple[int, list[int]]]
    """`Variant.routing` -> (queries whose heads were routed, how often each head was)."""


def evaluate(
    step: IndexerStep,
    engine: torch.Tensor,
    mass: torch.Tensor | None,
    of_model: IndexerSettings,
    variants: list[Variant],
) -> LayerResult:
    """Compare every variant with exact DSA.

    Args:
        step: n queries of one request, at most ROWS_AT_ONCE, and a cache with page means.
        engine: [n, k] int32, what the engine selected for them.
        mass: [n, N] of `attention_mass`, or None.
        of_model: k and H are taken from it.
    """
    visible, topk = step.rows.visible, of_model.topk
    exact = torch.empty(len(step.rows), topk, dtype=torch.int32, device=visible.device)
    step.select(None, topk, exact)
    kernels = {name: step.kernels if name == SERVED else _routed_by(STATISTICS[name], step) for name in STATISTICS}
    recalls, masses, routed = [], [], {}
    for variant in variants:
        settings = variant.settings(of_model)
        one = step if variant.statistic is None else replace(step, kernels=kernels[variant.statistic])
        selected = torch.empty_like(exact)
        wide = variant.statistic is None and settings.candidates > WIDE_CANDIDATES
        for part in _parts(len(exact), WIDE_ROWS if wide else ROWS_AT_ONCE):
            make_policy(settings).select(_rows(one, part), selected[part])
        recalls.append(metrics.recall(selected, exact).tolist())
        if mass is not None:
            masses.append(held(mass, selected).tolist())
        if variant.statistic is not None and variant.routing not in routed:
            heads = one.route(settings.active_heads, settings.pool_block)[visible >= settings.route_from]
            counts = torch.bincount(heads.flatten().long(), minlength=settings.index_heads)
            routed[variant.routing] = (len(heads), counts.tolist())
    return LayerResult(
        recalls,
        metrics.recall(engine, exact).tolist(),
        None if mass is None else masses,
        None if mass is None else held(mass, exact).tolist(),
        routed,
    )


def _parts(count: int, at_once: int) -> list[slice]:
    return [slice(start, start + at_once) for start in range(0, count, at_once)]


def _rows(step: IndexerStep, part: slice) -> IndexerStep:
    return replace(step, q=step.q[part], gates=step.gates[part], rows=step.rows[part])


def _routed_by(statistic: Statistic, step: IndexerStep) -> RoutedBy:
    """The step's kernels with another router; its scores are computed when a variant first asks for them."""
    known: dict[int, torch.Tensor] = {}

    def scores(pool_block: int) -> torch.Tensor:
        if pool_block not in known:
            rows = step.rows
            keys = reference.read_index_keys(step.index_cache, rows.block_table[0], rows.max_visible)
            known[pool_block] = statistic.scores(step.q.float(), step.gates, keys, rows.visible, pool_block)
        return known[pool_block]

    return RoutedBy(step.kernels, scores)


def _joined(results: list[LayerResult]) -> LayerResult:
    """The results of several groups of queries as one."""

    def queries(lists: Iterator[list]) -> list:
        return [value for values in lists for value in values]

    def variants(lists: Iterator[list[list]]) -> list[list]:
        return [queries(parts) for parts in zip(*lists, strict=True)]

    routed = {
        routing: (
            sum(result.routed[routing][0] for result in results),
            [sum(counts) for counts in zip(*(result.routed[routing][1] for result in results), strict=True)],
        )
        for routing in results[0].routed
    }
    has_mass = results[0].mass is not None
    return LayerResult(
        variants(result.recall for result in results),
        queries(result.engine_recall for result in results),
        variants(result.mass for result in results) if has_mass else None,
        queries(result.dsa_mass for result in results) if has_mass else None,
        routed,
    )


# ---------------------------------------------------------------- in the worker


class LayerProbe:
    """Keeps one layer's sampled queries, then evaluates them."""

    def __init__(self, layer: DSALayer, positions: list[int], variants: list[Variant]) -> None:
        self.layer = layer
        self.variants = variants
        self.count = len(positions)
        self.positions = torch.tensor(positions, dtype=torch.int32)
        self.queries: list[tuple[torch.Tensor, ...]] = []
        """(q as uint8, gates, visible, what the engine selected) of each step."""
        self.attention_queries: list[torch.Tensor] = []
        self.rows = torch.empty(0, dtype=torch.int64)
        """The sampled rows of the step under way."""
        self.step: IndexerStep | None = None
        self.result: LayerResult | None = None
        layer.indexer.observer = self.on_selection
        self._stop_watching = watch_attention(layer, self.on_attention)

    def stop(self) -> None:
        self.layer.indexer.observer = None
        self._stop_watching()

    def on_selection(self, step: IndexerStep, selected: torch.Tensor) -> None:
        """Keep the sampled queries of a step."""
        visible = step.rows.visible
        self.positions = self.positions.to(visible.device)
        self.rows = torch.nonzero(torch.isin(visible - 1, self.positions)).flatten()
        self.step = step
        if len(self.rows):
            topk = self.layer.indexer.settings.topk
            # as bytes: not every device and version of torch gathers and joins float8
            parts = (step.q.view(torch.uint8), step.gates, visible, selected[:, :topk])
            self.queries.append(tuple(tensor[self.rows] for tensor in parts))

    def on_attention(self, attention: AttentionStep) -> None:
        """Keep the sampled queries of the attention, and evaluate when all have been seen."""
        if not len(self.rows):
            return
        if attention.is_readable:
            self.attention_queries.append(attention.queries(self.rows))
        if sum(len(visible) for _, _, visible, _ in self.queries) == self.count:
            self._evaluate(attention)
        self.step = None

    def _evaluate(self, attention: AttentionStep) -> None:
        q, gates, visible, engine = (torch.cat(parts) for parts in zip(*self.queries, strict=True))
        count = int(visible.max())
        cache = private_cache(self.step, count)
        table = torch.arange(len(cache), dtype=torch.int32, device=cache.device).unsqueeze(0)
        request = torch.zeros_like(visible)
        rows = QueryRows(table, request, visible, count, int(visible.min()))
        whole = IndexerStep(q.view(torch.float8_e4m3fn), gates.float(), cache, rows, self.step.kernels)
        latent_q = torch.cat(self.attention_queries) if self.attention_queries else None
        latents = attention.latents(count) if self.attention_queries else None
        results = []
        for part in _parts(self.count, ROWS_AT_ONCE):
            mass = None
            if latents is not None:
                mass = attention_mass(latent_q[part], latents, visible[part], attention.scale)
            settings = self.layer.indexer.settings
            results.append(evaluate(_rows(whole, part), engine[part], mass, settings, self.variants))
        self.result = _joined(results)
        self.queries, self.attention_queries = [], []


class RecallProbe:
    """Methods that vLLM adds to its worker (`worker_extension_cls`); they are called by `collective_rpc`."""

    def misa_recall_start(self, positions: list[int], variants: list[dict]) -> None:
        """Watch the next prompt: its queries at `positions`, ascending, under `variants` (fields of `Variant`)."""
        wanted = [Variant(**fields) for fields in variants]
        layers = dsa_layers(self.vllm_config)
        self.misa_recall_probes = [LayerProbe(layer, positions, wanted) for layer in layers]

    def misa_recall_finish(self) -> list[dict]:
        """End the watch and return, per layer of this worker, its number, attention heads and `LayerResult`.

        Raises:
            RuntimeError: the prompt did not get to all positions.
        """
        probes, self.misa_recall_probes = self.misa_recall_probes, []
        for probe in probes:
            probe.stop()
        if any(probe.result is None for probe in probes):
            raise RuntimeError("the engine did not compute all sampled queries")
        return [
            {
                "layer": probe.layer.number,
                "heads": probe.layer.attention.num_heads,
                **vars(probe.result),
                "routed": [[list(key), *value] for key, value in probe.result.routed.items()],
            }
            for probe in probes
        ]
