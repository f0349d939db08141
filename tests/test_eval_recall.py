"""`misa-eval recall`: its figures against an independent computation from what an engine computed, and its messages."""

import gc
import json
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import vllm.envs
from vllm.distributed import cleanup_dist_env_and_memory

from misa_vllm import metrics, reference
from misa_vllm.eval import cli, probe, recall
from misa_vllm.eval.probe import Variant
from misa_vllm.eval.report import can_draw
from misa_vllm.eval.statistics import STATISTICS
from misa_vllm.index_cache import PAGE_TOKENS
from misa_vllm.indexer import Indexer
from misa_vllm.kernels import choose_kernels
from misa_vllm.models import tiny
from misa_vllm.policies import IndexerStep
from misa_vllm.settings import IndexerSettings
from tests.engine.conftest import TOPK, random_prompt, row_by_row_products, write_model  # noqa: F401
from tests.kernels.cases import make_case

CONTEXT = 400
HEADS = 64
QUERIES = 24
VARIANTS = [
    Variant("misa", 4, 64, None, "mean"),
    Variant("misa", 4, 128, None, "mean"),
    Variant("misa", HEADS, 128, None, "mean"),
    Variant("misa", 4, 64, None, "mean_max"),
    Variant("misa", 4, 64, None, "mean_positive"),
    Variant("misa", 4, None, None, "oracle"),
    Variant("hierarchical", 4, 64, 128, "mean"),
    Variant("hierarchical", 4, 64, 2**20, "mean"),
    Variant("hisa", candidates=256),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors are small here, and threads that wait for each other cost more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- one engine


class Captured:
    """What one layer computed for the sampled queries of a prompt, taken from the classes that serve."""

    def __init__(self) -> None:
        self.queries: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.keys = self.latents = None
        self.attention_queries: dict[int, torch.Tensor] = {}
        self.scale = 0.0


class Engine:
    """A small model with the probe in its workers, measured at any chunk size."""

    def __init__(self, model: str, *words: str) -> None:
        args = ["recall", model, "--text", "none", "--context", str(CONTEXT), "--dtype", "float32", *words]
        self.llm = recall.start_engine(cli.parser("recall").parse_args(args))
        torch.set_num_threads(1)  # vLLM has chosen its own
        self.positions = recall.sample_positions(CONTEXT, TOPK, QUERIES, seed=3)

    def close(self) -> None:
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        gc.collect()
        cleanup_dist_env_and_memory()

    def measure(self, chunk: int = 1024, prompts: int = 1) -> dict:
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        scheduler.max_num_scheduled_tokens = chunk
        texts = [random_prompt(CONTEXT - 1, seed) for seed in range(prompts)]
        return recall.measure(self.llm, texts, self.positions, VARIANTS, TOPK, HEADS, CONTEXT)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("models") / "recall")


@pytest.fixture(scope="module")
def engine(model):
    running = Engine(model)
    yield running
    running.close()


@pytest.fixture(scope="module")
def captured(engine):
    """(figures, {layer: Captured}) of one run."""
    from misa_vllm.backend import SparseMLAImpl

    layers: dict[int, Captured] = {}
    select, forward_mqa = Indexer.select, SparseMLAImpl.forward_mqa

    def capture_select(indexer, q, gates, index_cache, rows, out, exact=False):
        select(indexer, q, gates, index_cache, rows, out, exact)
        layer = layers.setdefault(id(indexer), Captured())
        for row, visible in enumerate(rows.visible.tolist()):
            layer.queries[visible - 1] = q[row].clone(), gates[row].clone()
        layer.keys = reference.read_index_keys(index_cache, rows.block_table[0], rows.max_visible)

    def capture_attention(impl, q, kv_cache, attn_metadata, layer):
        one = layers[id(impl.indexer.k_cache.indexer)]
        rows = attn_metadata.rows
        for row, visible in enumerate(rows.visible.tolist()):
            one.attention_queries[visible - 1] = torch.cat([part[row] for part in q], dim=-1)
        pages = rows.block_table[0, : -(-rows.max_visible // PAGE_TOKENS)].long()
        one.latents = kv_cache[pages].flatten(0, 1)[: rows.max_visible].clone()
        one.scale = impl.scale
        return forward_mqa(impl, q, kv_cache, attn_metadata, layer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Indexer, "select", capture_select)
        patch.setattr(SparseMLAImpl, "forward_mqa", capture_attention)
        figures = engine.measure(chunk=300)
    return figures, dict(enumerate(layers.values()))


def selections(layer: Captured, positions: list[int], variant: Variant) -> list[set[int]]:
    """The variant's tokens by the definitions alone, each query over dense keys."""
    q = torch.stack([layer.queries[p][0] for p in positions]).float()
    gates = torch.stack([layer.queries[p][1] for p in positions])
    visible = torch.tensor([p + 1 for p in positions])
    keys, h, block = layer.keys, variant.active_heads, variant.pool_block
    if variant.policy == "hisa":
        chosen = reference.hisa(q, gates, keys, visible, TOPK, 128, variant.candidates // 128)
    elif variant.statistic != "mean":
        scores = STATISTICS[variant.statistic].scores(q, gates, keys, visible, block)
        heads = reference.take_heads(q, gates, reference.top_heads(scores, h))
        chosen = reference.top_tokens(reference.token_scores(*heads, keys), visible, TOPK)
    elif variant.policy == "misa":
        chosen = reference.misa(q, gates, keys, visible, TOPK, h, block)
    else:
        chosen = reference.hierarchical(q, gates, keys, visible, TOPK, h, block, min(variant.candidates, len(keys)))
    return [set(row.tolist()) - {-1} for row in chosen]


def exact_selections(layer: Captured, positions: list[int]) -> list[set[int]]:
    q = torch.stack([layer.queries[p][0] for p in positions]).float()
    gates = torch.stack([layer.queries[p][1] for p in positions])
    visible = torch.tensor([p + 1 for p in positions])
    return [set(row.tolist()) for row in reference.dsa(q, gates, layer.keys, visible, TOPK)]


def probabilities(layer: Captured, position: int) -> torch.Tensor:
    """Full attention's probabilities of one query, mean of the heads, [position + 1] float64."""
    logits = layer.attention_queries[position].double() @ layer.latents[: position + 1].double().T
    return torch.softmax(logits * layer.scale, dim=-1).mean(dim=0)


def test_recall_is_that_of_the_definitions(engine, captured):
    figures, layers = captured
    assert figures["layers"] == [0, 1]
    seen = set()
    for variant, row in zip(VARIANTS, figures["variants"], strict=True):
        for number, layer in layers.items():
            chosen, exact = selections(layer, engine.positions, variant), exact_selections(layer, engine.positions)
            expected = [len(one & other) / TOPK for one, other in zip(chosen, exact, strict=True)]
            # scores summed in another order may swap two tokens at the threshold: in a quarter of the queries at most
            assert row["per_layer"][number]["recall_mean"] == pytest.approx(np.mean(expected), abs=1 / (4 * TOPK))
            seen.add(round(float(np.mean(expected)), 3))
    assert len(seen) > 4, "the variants cannot be told apart"


def test_engine_selected_what_exact_dsa_selects(captured):
    assert captured[0]["engine"] == {"recall_mean": 1.0, "recall_p5": 1.0}


def test_all_heads_and_all_candidates_are_exact(captured):
    by_variant = dict(zip(VARIANTS, captured[0]["variants"], strict=True))
    assert by_variant[VARIANTS[2]]["recall_p5"] == 1 == by_variant[VARIANTS[7]]["recall_p5"]
    assert by_variant[VARIANTS[2]]["mass_ratio"] == pytest.approx(1)
    assert by_variant[VARIANTS[0]]["recall_mean"] < by_variant[VARIANTS[6]]["recall_mean"] < 1


def test_attention_mass_is_that_of_full_attention(engine, captured):
    figures, layers = captured
    for variant, row in ((VARIANTS[0], figures["variants"][0]), (VARIANTS[8], figures["variants"][8])):
        for number, layer in layers.items():
            chosen, exact = selections(layer, engine.positions, variant), exact_selections(layer, engine.positions)
            all_of = [probabilities(layer, position) for position in engine.positions]
            mass = np.mean([float(p[sorted(one)].sum()) for p, one in zip(all_of, chosen, strict=True)])
            dsa_mass = np.mean([float(p[sorted(one)].sum()) for p, one in zip(all_of, exact, strict=True)])
            assert row["per_layer"][number]["dsa_mass"] == pytest.approx(dsa_mass, abs=1e-4)
            assert row["per_layer"][number]["mass"] == pytest.approx(mass, abs=1e-3)
            assert 0 < mass < 1


def test_head_usage_counts_routed_queries(engine, captured):
    figures, layers = captured
    usage = {(one["active_heads"], one["pool_block"], one["statistic"]): one for one in figures["head_usage"]}
    assert len(usage) == len({variant.routing for variant in VARIANTS if variant.statistic})
    for number, layer in layers.items():
        of_layer = usage[4, 128, "mean"]["layers"][number]
        routed = [position for position in engine.positions if position + 1 >= 128]
        q = torch.stack([layer.queries[p][0] for p in routed]).float()
        gates = torch.stack([layer.queries[p][1] for p in routed])
        heads = reference.route(q, gates, layer.keys, torch.tensor(routed) + 1, 4, 128)
        expected = torch.bincount(heads.flatten().long(), minlength=HEADS) / len(routed)
        assert of_layer["queries"] == len(routed) < len(engine.positions)
        assert of_layer["share"] == pytest.approx(expected.tolist(), abs=1.5 / len(routed))
        assert of_layer["never"] == [head for head in range(HEADS) if of_layer["share"][head] == 0]
        assert of_layer["always"] == [head for head in range(HEADS) if of_layer["share"][head] == 1]
    assert all(layer["always"] == list(range(HEADS)) for layer in usage[HEADS, 128, "mean"]["layers"])


def test_figures_do_not_depend_on_the_chunk(engine, captured):
    def figures(result):
        return {name: value for name, value in result.items() if name != "seconds"}

    assert figures(engine.measure(chunk=64)) == figures(captured[0])


def test_several_texts_are_pooled(engine, captured):
    both = engine.measure(prompts=2)
    assert both["queries"] == 2 * QUERIES
    first = captured[0]["variants"][0]["recall_mean"]
    second = 2 * both["variants"][0]["recall_mean"] - first
    assert 0 < second < 1 and second != first
    assert sum(part["queries"] for part in both["variants"][0]["by_position"]) == 2 * QUERIES


def test_probes_leave_the_engine_as_it_was(engine):
    worker = engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    engine.measure()
    for layer in probe.dsa_layers(worker.vllm_config):
        assert layer.indexer.observer is None
        assert "forward_mqa" not in vars(layer.attention.impl)


def test_unfinished_prompt_is_an_error(engine):
    wanted = [vars(variant) for variant in VARIANTS[:1]]
    engine.llm.collective_rpc("misa_recall_start", args=([CONTEXT], wanted))
    with pytest.raises(RuntimeError, match="did not compute all sampled queries"):
        engine.llm.collective_rpc("misa_recall_finish")


def test_command_writes_what_it_says(engine, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recall, "start_engine", lambda args: engine.llm)
    text = tmp_path / "text.txt"
    text.write_text(tiny.TRAINING_TEXT.read_text()[:4000])
    words = ["recall", model, "--text", str(text), "--context", "200,400", "--heads", "4,8", "--pool-block", "64,128"]
    assert cli.main([*words, "--candidates", "128", "--queries", "8", "--output", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "recall.json").read_text())
    assert set(result) == {
        "environment", "seconds", "model", "architecture", "index_heads", "topk", "seed", "arguments", "texts",
        "contexts",
    }  # fmt: skip
    assert set(result["environment"]) >= {"date", "hardware", "torch", "vllm", "misa_vllm", "commit"}
    assert (result["index_heads"], result["topk"]) == (HEADS, TOPK)
    assert re.fullmatch("[0-9a-f]{64}", result["texts"][0]["sha256"]) and result["texts"][0]["file"] == "text.txt"
    assert [part["context"] for part in result["contexts"]] == [200, 400]
    for part in result["contexts"]:
        assert len(part["variants"]) == 2 * 2 * 2 + 3
        for row in part["variants"]:
            assert 0 <= row["recall_p5"] <= row["recall_mean"] <= 1
            assert row["worst_layer_recall"] == min(one["recall_mean"] for one in row["per_layer"])
            assert row["mass_ratio"] == pytest.approx(row["mass"] / part["dsa_mass"])
    if can_draw("recall.png"):
        assert (tmp_path / "out" / "recall.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert not (tmp_path / "out" / "recall.png").exists()
    table = capsys.readouterr().out
    assert table.count("\nmisa h=4 B=64 ") == 2 and "hisa m=" in table


def test_two_ranks_report_what_one_does(engine, captured, model, monkeypatch):
    engine.close()  # vLLM keeps the groups of one engine in a process
    # else each rank wants a memory node to itself; the engine above had vLLM keep the variable's value
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setattr(vllm.envs, "VLLM_CPU_OMP_THREADS_BIND", "nobind", raising=False)
    two = Engine(model, "--tensor-parallel-size", "2")
    both = two.measure()
    two.close()
    assert [row["name"] for row in both["variants"]] == [row["name"] for row in captured[0]["variants"]]
    for row, of_one in zip(both["variants"], captured[0]["variants"], strict=True):
        # the ranks' partial sums and whole products round differently in float32, a token in a hundred may be another
        assert row["recall_mean"] == pytest.approx(of_one["recall_mean"], abs=0.01)
        assert row["mass"] == pytest.approx(of_one["mass"], abs=0.01)
        assert row["per_layer"][0]["dsa_mass"] == pytest.approx(of_one["per_layer"][0]["dsa_mass"], abs=1e-4)


# ---------------------------------------------------------------- parts


def step_of(visible=(400, 900, 1500), heads=64):
    case = make_case([list(visible)], heads, seed=11)
    order = case.rows.visible.argsort()
    rows = replace(case.rows.take(order), min_visible=min(visible))
    return IndexerStep(case.q[order], case.gates[order], case.index_cache, rows, choose_kernels("cpu")), case.keys[0]


def settings(topk=64, heads=64):
    return IndexerSettings("dsa", heads, topk, 8, 1024, 8192, 0, routes_heads=False)


def test_attention_mass_of_all_tokens_is_one():
    generator = torch.Generator().manual_seed(1)
    q, latents = torch.randn(3, 5, 72, generator=generator), torch.randn(200, 72, generator=generator)
    visible = torch.tensor([1, 77, 200])
    mass = probe.attention_mass(q, latents, visible, scale=0.3)
    everything = torch.arange(200, dtype=torch.int32).repeat(3, 1)
    seen = everything.masked_fill(everything >= visible.unsqueeze(1), -1)
    assert probe.held(mass, seen).tolist() == pytest.approx([5, 5, 5], rel=1e-5)
    assert probe.held(mass, everything).tolist() == pytest.approx([5, 5, 5], rel=1e-5), "invisible keys have no mass"
    assert 0 < float(probe.held(mass, seen[:, :50])[1]) < 5


def test_attention_mass_is_computed_in_parts(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    q, latents = torch.randn(7, 3, 40, generator=generator), torch.randn(100, 40, generator=generator)
    visible = torch.arange(94, 101)
    whole = probe.attention_mass(q, latents, visible, 0.1)
    monkeypatch.setattr(probe, "LOGITS_BYTES", 1)
    torch.testing.assert_close(probe.attention_mass(q, latents, visible, 0.1), whole)


def test_private_cache_holds_the_keys_in_order_and_their_means():
    step, keys = step_of()
    own = probe.private_cache(step, 1500)
    table = torch.arange(len(own), dtype=torch.int32)
    torch.testing.assert_close(reference.read_index_keys(own, table, 1500).double(), keys[:1500])
    means = reference.means_view(own)[:23]
    torch.testing.assert_close(means.double(), keys[:1472].unflatten(0, (23, 64)).mean(dim=1), rtol=1e-5, atol=1e-6)


def in_order(step, count):
    """The step over a private cache."""
    cache = probe.private_cache(step, count)
    rows = replace(step.rows, block_table=torch.arange(len(cache), dtype=torch.int32).unsqueeze(0), max_visible=count)
    return replace(step, index_cache=cache, rows=rows)


def test_wide_candidates_are_selected_in_small_groups(monkeypatch):
    step, _ = step_of((300, 500, 700, 900, 1100))
    variants = [Variant("hisa", candidates=256)]
    arguments = (in_order(step, 1100), torch.zeros(5, 64, dtype=torch.int32), None, settings(), variants)
    expected = probe.evaluate(*arguments)
    assert 0 < min(expected.recall[0]) < 1
    monkeypatch.setattr(probe, "WIDE_CANDIDATES", 128)
    monkeypatch.setattr(probe, "WIDE_ROWS", 2)
    assert probe.evaluate(*arguments) == expected


def test_groups_of_queries_are_joined():
    step, _ = step_of((300, 500, 700, 900, 1100))
    whole = in_order(step, 1100)
    rows = whole.rows
    engine = torch.zeros(5, 64, dtype=torch.int32)
    mass = torch.rand(5, 1100, generator=torch.Generator().manual_seed(3))
    variants = [Variant("misa", 2, 512, None, "mean"), Variant("misa", 2, 64, None, "mean_max")]
    expected = probe.evaluate(whole, engine, mass, settings(), variants)
    parts = []
    for part in (slice(0, 2), slice(2, 5)):
        step = replace(whole, q=whole.q[part], gates=whole.gates[part], rows=rows[part])
        parts.append(probe.evaluate(step, engine[part], mass[part], settings(), variants))
    assert probe._joined(parts) == expected
    assert expected.routed[2, 512, "mean"][0] == 3  # the queries that see a whole block


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_by_their_formulas(name):
    """Against sums written out per head and block, in float64."""
    step, keys = step_of((200, 333, 640))
    q, gates, visible = step.q.double(), step.gates.double(), step.rows.visible
    keys = keys[:640]
    got = STATISTICS[name].scores(q.float(), step.gates, keys.float(), visible, 64)
    for m, count in enumerate(visible.tolist()):
        for head in (0, 31, 63):
            vector, total = q[m, head], 0.0
            for block in keys[: count // 64 * 64].split(64):
                products = block @ vector
                per_dimension = (block * vector).clamp(min=0)
                total += {
                    "mean": products.mean().clamp(min=0),
                    "mean_max": (products.mean().clamp(min=0) + (block.amax(dim=0) @ vector).clamp(min=0)) / 2,
                    "mean_positive": per_dimension.sum(dim=1).mean(),
                    "oracle": 0.0,
                }[name]
            if name == "oracle":
                total = (keys[:count] @ vector).clamp(min=0).sum()
            assert float(got[m, head]) == pytest.approx(float(gates[m, head].abs() * total), rel=1e-4)


def test_ranks_add_their_heads():
    def report(layer, heads, mass):
        return {
            "layer": layer, "heads": heads, "recall": [[0.5, 1.0]], "engine_recall": [1.0, 1.0],
            "mass": None if mass is None else [[mass] * 2], "dsa_mass": None if mass is None else [mass * 2] * 2,
            "routed": [[[4, 64, "mean"], 2, [1, 1]]],
        }  # fmt: skip

    figures = recall.merged([[report(3, 2, 0.5)], [report(3, 2, 1.5), report(7, 4, 1.0)]])
    assert list(figures) == [3, 7]
    assert figures[3].mass.tolist() == [[0.5, 0.5]] and figures[3].dsa_mass.tolist() == [1.0, 1.0]
    assert figures[7].mass.tolist() == [[0.25, 0.25]]
    assert figures[3].recall.tolist() == [[0.5, 1.0]]
    assert recall.merged([[report(0, 2, None)]])[0].mass is None


def test_quantised_cache_leaves_the_mass_out():
    from misa_vllm.seam.observe import AttentionStep

    q, table = torch.zeros(1, 2, 8), torch.zeros(1, 1, dtype=torch.int32)
    assert AttentionStep((q, q), torch.zeros(1, 64, 16), table, 1.0).is_readable
    assert not AttentionStep((q, q), torch.zeros(1, 64, 16, dtype=torch.uint8), table, 1.0).is_readable
    assert not AttentionStep((q.to(torch.float8_e4m3fn),), torch.zeros(1, 64, 8), table, 1.0).is_readable
    figures = {
        0: recall.LayerFigures(np.ones((1, 4)), np.ones(4), None, None, {(4, 64, "mean"): (4, np.ones(64, dtype=int))})
    }
    part = recall.summary(figures, np.array([70, 80, 90, 95]), VARIANTS[:1], 64, HEADS, 100)
    assert part["variants"][0]["mass"] is None and part["variants"][0]["mass_ratio"] is None
    environment = {"hardware": "a machine", "commit": None}
    result = {"architecture": "A", "index_heads": 64, "topk": 64, "seed": 0, "environment": environment}
    text = recall.as_text(result | {"contexts": [{"context": 100, "queries": 4, **part}]})
    assert "no attention mass: it is not computed from a quantised KV cache" in text
    assert [line for line in text.splitlines() if line.startswith("misa h=4")][0].split()[-1] == "(0)"


@pytest.mark.parametrize(("context", "topk", "count"), [(8192, 2048, 256), (300, 256, 256), (300, 256, 7)])
def test_positions_are_spread_and_repeat(context, topk, count):
    positions = recall.sample_positions(context, topk, count, seed=5)
    assert positions == recall.sample_positions(context, topk, count, seed=5)
    assert positions == sorted(set(positions)) and topk <= positions[0] and positions[-1] < context - 1
    assert len(positions) == min(count, context - 1 - topk)
    width = (context - 1 - topk) / len(positions)
    assert max(np.diff(positions), default=0) <= 2 * width + 2
    if len(positions) < context - 1 - topk:
        assert positions != recall.sample_positions(context, topk, count, seed=6)


@pytest.mark.parametrize("heads", [4, 8, 16])
def test_hisa_of_equal_cost_costs_the_same(heads):
    topk, index_heads = 2048, 64
    wanted = {"policy": ["misa", "hisa"], "heads": [heads], "pool_block": [64, 1024], "statistics": ["mean"]}
    args = Namespace(**wanted, candidates=8192)
    positions = recall.sample_positions(131072, topk, 256, seed=0)
    _, ours, plain, equal = recall.variants_of(args, positions, topk, index_heads)
    assert ours.pool_block == 1024 and plain == Variant("hisa", candidates=64 * 128)
    price = recall.cost(ours, positions, topk, index_heads)
    assert recall.cost(equal, positions, topk, index_heads) <= price
    one_more = replace(equal, candidates=equal.candidates + 128)
    assert recall.cost(one_more, positions, topk, index_heads) > price


def test_hisa_keeps_enough_blocks_for_top_k():
    ours = Variant("misa", 1, 64, None, "mean")
    assert recall.equal_cost_hisa(ours, np.array([700, 800]), 600, 64).candidates == 640
    assert recall.equal_cost_hisa(ours, np.array([700, 800]), 64, 64).candidates == 256


def test_cost_of_the_policies():
    at = [4095]  # one query that sees 4096 keys
    assert recall.cost(Variant("misa", 8, 64, None, "mean"), at, 256, 64) == pytest.approx(8 / 64 + 1 / 64)
    assert recall.cost(Variant("misa", 8, 64, None, "mean_max"), at, 256, 64) == pytest.approx(8 / 64 + 2 / 64)
    assert recall.cost(Variant("misa", 8, None, None, "oracle"), at, 256, 64) == 1
    assert recall.cost(Variant("hierarchical", 8, 64, 1024, "mean"), at, 256, 64) == pytest.approx(9 / 64 + 1 / 4)
    assert recall.cost(Variant("hierarchical", 8, 64, 4096, "mean"), at, 256, 64) == 1
    assert recall.cost(Variant("misa", 8, 8192, None, "mean"), at, 256, 64) == 1
    assert recall.cost(Variant("hisa", candidates=1024), at, 256, 64) == pytest.approx(1 / 128 + 1 / 4)


def test_selections_of_stock_kernels_are_observed(monkeypatch):
    """CUDA's scoring function under policy dsa, around a stand-in for stock's."""
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")  # read when vLLM's module is imported
    from misa_vllm.seam import cuda

    buffer = torch.zeros(10, 4, dtype=torch.int32)
    monkeypatch.setattr(cuda.attention, "sparse_attn_indexer", lambda *args, **kwargs: buffer.fill_(7))
    monkeypatch.setattr(cuda.attention.DeepseekV32Indexer, "indexer_cache_cls", None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    indexer = Indexer(settings(topk=4), "cpu")
    index_cache = torch.zeros(4, 8448, dtype=torch.uint8)
    layers = {"layer": Namespace(indexer=indexer, index_cache=index_cache)}
    context = Namespace(no_compile_layers=layers, attn_metadata=None)
    monkeypatch.setattr(cuda, "get_forward_context", lambda: context)
    cuda.extend_fused_indexer(object)
    q, weights = torch.zeros(8, 64, 128).to(torch.float8_e4m3fn), torch.ones(8, 64)
    arguments = (None, "layer", None, q, None, None, weights, 128, "ue8m0", 4, 128, 1000, 2000, buffer)
    seen = []
    indexer.observer = lambda step, selected: seen.append((step, selected.clone()))
    assert cuda.attention.sparse_attn_indexer(*arguments) is buffer and not seen  # memory profiling
    context.attn_metadata = {
        "layer": Namespace(
            query_start_loc=torch.tensor([0, 5], dtype=torch.int32), slot_mapping=torch.arange(6),
            seq_lens=torch.tensor([9], dtype=torch.int32), block_table=torch.zeros(1, 4, dtype=torch.int32),
            max_seq_len=9, min_visible=5,
        )
    }  # fmt: skip
    assert cuda.attention.sparse_attn_indexer(*arguments) is buffer
    ((step, selected),) = seen
    assert step.rows.visible.tolist() == [5, 6, 7, 8, 9, 0]
    assert len(step.q) == len(step.gates) == len(selected) == 6 and step.index_cache is index_cache
    assert selected.unique().tolist() == [7]
    indexer.observer = None
    assert cuda.attention.sparse_attn_indexer(*arguments) is buffer and len(seen) == 1


def test_recall_counts_what_the_metrics_count():
    exact = torch.tensor([[1, 2, 3, 4]], dtype=torch.int32)
    assert metrics.recall(torch.tensor([[4, 9, 1, -1]], dtype=torch.int32), exact).tolist() == [0.5]


# ---------------------------------------------------------------- messages


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(tiny.TRAINING_TEXT.read_text()[:2000])
    return file


def refusal(capsys, monkeypatch, *words) -> str:
    """The one line that the command ends with; no engine is started."""
    monkeypatch.setattr(recall, "start_engine", lambda args: pytest.fail("an engine was started"))
    assert cli.main(["recall", *map(str, words)]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("misa-eval: ")]
    assert len(lines) == 1 and captured.out == ""
    return lines[0].removeprefix("misa-eval: error: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--context", "200000"], "--context 200000 is beyond the model's limit: choose at most 131072"),
        (["--context", "64"], f"--context 64 leaves no query that sees more than the {TOPK} tokens it selects"),
        (["--context", "4096"], "tokens, --context 4096 takes 4095: name a longer text or a shorter context"),
        (["--heads", "8,65"], "active_heads=65 is out of range: the model has 64 indexer heads"),
        (["--pool-block", "64,100"], "pool_block=100 must be a multiple of the KV page, 64 tokens"),
        (["--candidates", "10"], f"candidates=10 is less than the {TOPK} tokens the model selects"),
        (["--engine-options", '{"wrong": 1}'], "cannot be opened: TypeError"),
        (["--dtype", "int8"], "cannot be opened: "),
    ],
)
def test_what_cannot_be_measured(model, text, words, message, capsys, monkeypatch):
    assert message in refusal(capsys, monkeypatch, model, "--text", text, *words)


def test_bad_texts(model, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfd")
    for name, message in {
        "none.txt": "cannot be read (No such file or directory): name a text file",
        "empty.txt": "is empty: name a file with text",
        "bytes.txt": "is not UTF-8 text",
        ".": "cannot be read (Is a directory)",
    }.items():
        assert message in refusal(capsys, monkeypatch, model, "--text", tmp_path / name)


def test_bad_models(text, tmp_path, capsys, monkeypatch):
    assert "/nowhere cannot be opened: Invalid repository ID" in refusal(
        capsys, monkeypatch, "/nowhere", "--text", text, "--engine-options", '{"skip_tokenizer_init": true}'
    )
    tiny.write_model(tmp_path / "plain", tiny.TinySize(vocab=600, layers=1))
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config = {name: value for name, value in config.items() if not name.startswith("index_")}
    config |= {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    assert "plain has no DSA indexer" in refusal(capsys, monkeypatch, tmp_path / "plain", "--text", text)


def test_output_is_asked_for_first(text, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    message = refusal(capsys, monkeypatch, "/nowhere", "--text", text, "--output", tmp_path / "file" / "out")
    assert "cannot be written: name a folder that you may write to" in message


@pytest.mark.parametrize("tool", cli.COMMAND.tools)
def test_every_tool_says_what_it_takes(tool, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([tool, "--help"])
    assert stop.value.code == 0
    assert f"usage: misa-eval {tool}" in capsys.readouterr().out


def test_unknown_tool_is_refused_with_the_names(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["unknown"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert all(tool in error for tool in cli.COMMAND.tools)


@pytest.mark.parametrize(
    "words",
    [["--heads", "0"], ["--heads", "a"], ["--policy", "dsa"], ["--statistics", "median"], ["--engine-options", "[]"]],
)
def test_bad_words(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["recall", "model", "--text", "text.txt", *words])
    assert stop.value.code == 2
    assert f"argument {words[0]}" in capsys.readouterr().err
