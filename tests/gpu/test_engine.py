"""`--attention-backend misa` in vLLM's fused DSA path on a GPU: what tests/engine does not show.

Engines start slowly, so each serves several tests.
"""

from collections import Counter
from contextlib import contextmanager
from functools import wraps

import pytest
import torch

from misa_vllm import metrics
from misa_vllm.indexer import Indexer
from tests.engine.conftest import TOPK, Engine, greedy, offline_engine, products_row_by_row, random_prompt, write_model
from tests.engine.settled import settle

TOKENS = 24
OPTIONS = {
    "max_model_len": 45056,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 8192,
    # all 64 prompts at once; given in bytes, as other tests may share the GPU
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 6 * 2**30,
}


@pytest.fixture(scope="module")
def extended(deepseek_model):
    """vLLM's model code as an engine imports it: how its graphs are captured depends on what the engine sets before."""
    with offline_engine(deepseek_model, {}, enforce_eager=True, **OPTIONS):
        pass


@contextmanager
def settled_selections():
    """Stock's selections, made unique: ties would tell its runs apart, and attention rounds by the order of tokens.

    Yields how many rows had a token that is not among their best, counted on the GPU, also by captured graphs.
    """
    from vllm.model_executor.layers import sparse_attn_indexer as layer

    ops, get_topk = layer.ops, layer.get_indexer_topk
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")

    class SettledOps:
        def __getattr__(self, name):
            return getattr(ops, name)

        def top_k_per_row_prefill(self, scores, first, end, selected, *args):
            ops.top_k_per_row_prefill(scores, first, end, selected, *args)
            wrong.add_(settle(scores, first, end, selected))

    def get_settled_topk(backend):
        def topk(scores, lengths, next_n, selected, *args):
            get_topk(backend)(scores, lengths, next_n, selected, *args)
            end = lengths.reshape(-1)[: len(scores)]
            wrong.add_(settle(scores, torch.zeros_like(end), end, selected))

        return topk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "ops", SettledOps())
        patch.setattr(layer, "get_indexer_topk", get_settled_topk)
        yield wrong


def generate_twice(model, prompts, misa=None, **options):
    """Greedy tokens of stock vLLM (`misa` None) or under the backend, CUDA graphs on; two runs from empty caches."""
    runs = []
    with settled_selections() as wrong, offline_engine(model, misa, **OPTIONS, **options) as llm:
        wrong.zero_()  # what the start ran on was no request
        for _ in range(2):
            assert llm.reset_prefix_cache()
            runs.append(greedy(llm, prompts, TOKENS))
        assert wrong == 0, "rows have tokens that are not among their best"
    return runs


@pytest.fixture(scope="module")
def prompts():
    """64 prompts of 3K to 40K tokens."""
    return [random_prompt(3000 + 587 * i, seed=i) for i in range(64)]


# On GLM's shape, where nothing but vLLM's own kernels ran, the top-k that vLLM 0.32 decodes with by default was seen to
# keep a token twice and others that are not among the best (1 of 2972 rows, none with a NaN); its reference was not.
WRONG_TOPK = pytest.mark.xfail(strict=False, reason="vLLM's default decode top-k now and then selects wrong tokens")


@pytest.mark.parametrize(
    "model, topk",
    [
        ("deepseek_model", "auto"),
        ("glm_model", "torch"),
        pytest.param("glm_model", "auto", marks=WRONG_TOPK),
    ],
)
def test_dsa_generates_stocks_tokens(extended, model, topk, prompts, request):
    model = request.getfixturevalue(model)
    stock = generate_twice(model, prompts, sparse_indexer_topk_backend=topk)
    assert stock[0] == stock[1], "stock differs from itself"
    assert generate_twice(model, prompts, {"policy": "dsa"}, sparse_indexer_topk_backend=topk) == stock


def test_exact_decode_generates_what_dsa_does(extended, deepseek_model):
    """From prompts that fit in top-k, so that nothing but decode steps chooses; one routed head would choose badly."""
    prompts = [random_prompt(TOPK - 12 - i, seed=i) for i in range(8)]
    routed = {"pool_block": 64, "active_heads": 1}
    generated = []
    for misa in ({"policy": "dsa"}, {**routed, "exact_decode": True}, routed):
        with settled_selections(), offline_engine(deepseek_model, misa, **OPTIONS) as llm:
            generated.append(greedy(llm, prompts, 64))
    assert generated[0] == generated[1]
    assert generated[0] != generated[2], "the model cannot tell one head from all"


def test_prompts_are_audited(deepseek_model, monkeypatch):
    """Every 64th position of a prompt, in both layers; what graphs decode is left out."""
    length, counted = 3009, Counter()  # no such position follows among the tokens decoded
    options = {**OPTIONS, "max_num_seqs": 4}
    with offline_engine(deepseek_model, {"pool_block": 64, "audit_every": 64}, **options) as llm:
        monkeypatch.setattr(metrics, "_add", lambda counter, amount: counted.update({counter: amount}))
        greedy(llm, [random_prompt(length)], TOKENS)
    assert counted["audited_queries"] == 2 * len(range(-(-(TOPK + 1) // 64) * 64, length + 1, 64))
    assert 0 < counted["audited_recall_sum"] < counted["audited_queries"]


# ---------------------------------------------------------------- every policy, every decoding mode

SERVED = {
    "misa": ({}, {"policy": "misa"}, {}),
    "misa, mean_positive": ({}, {"policy": "misa", "statistic": "mean_positive"}, {}),
    "hierarchical, GLM, fp8 KV cache": (
        {"architecture": "glm"}, {"policy": "hierarchical", "candidates": 2 * TOPK}, {"kv_cache_dtype": "fp8"}
    ),
    "hisa": ({}, {"policy": "hisa", "candidates": 2 * TOPK}, {}),
    "misa, two drafts": (
        {"mtp_layers": 1}, {"policy": "misa"}, {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}}
    ),
}  # fmt: skip
"""Name -> (sizes of the model, options of the backend, options of vLLM)."""

PROMPTS = [random_prompt(length, seed=length) for length in (100, TOPK + 1, 3000, 9000, 5)]
"""The last waits until others end, and is then few enough tokens for a piecewise graph, with a decode beside it."""


LAYERS = 3  # of the model and its draft, at most
PREFILL_STEPS = 4  # that PROMPTS need at 8192 tokens a step, at most, with those in piecewise graphs


def generate_in_graphs(model, misa, options):
    """What an engine with CUDA graphs generates from PROMPTS; its decode steps must not run Python."""
    calls = []
    with offline_engine(model, misa, **options) as llm, pytest.MonkeyPatch.context() as patch:
        graphs = llm.llm_engine.vllm_config.compilation_config.cudagraph_mode
        assert graphs.decode_mode().name == "FULL", f"decode runs in {graphs.name} graphs"
        select = Indexer.select

        @wraps(select)
        def counted(indexer, *args):
            calls.append(len(args[0]))
            return select(indexer, *args)

        patch.setattr(Indexer, "select", counted)
        tokens = greedy(llm, PROMPTS, TOKENS)
    if "speculative_config" not in options:  # requests that verify drafts and others make steps no graph is made for
        assert len(calls) <= LAYERS * PREFILL_STEPS, f"selections outside of graphs, of so many rows: {calls}"
    return tokens


@pytest.fixture(scope="module", params=SERVED)
def served(request, tmp_path_factory):
    """(what an engine with CUDA graphs generated from PROMPTS, an engine without)."""
    sizes, misa, options = SERVED[request.param]
    model = write_model(tmp_path_factory.mktemp("models") / "model", **sizes)
    options = {**OPTIONS, "max_num_seqs": len(PROMPTS) - 1, **options}
    with products_row_by_row():
        tokens = generate_in_graphs(model, {"pool_block": 64, "min_context": 0, **misa}, options)
        engine = Engine(model, misa, attention_config={}, **options)
        yield tokens, engine
        engine.close()


def test_graphs_generate_what_eager_does(served):
    tokens, engine = served
    assert engine.generate(PROMPTS, TOKENS) == tokens


def test_another_run_selects_the_same(served):
    _, engine = served
    runs = []
    for _ in range(2):
        engine.forget_prefixes()
        tokens = engine.generate(PROMPTS, TOKENS)
        runs.append((tokens, [list(layer) for layer in engine.history]))
    assert runs[0] == runs[1]


def test_mixed_batches_select_as_alone(served):
    """Prefills join running decodes; the first layer's selections are those of each request alone."""
    _, engine = served
    engine.forget_prefixes()
    engine.set_chunk(512)
    engine.generate([random_prompt(3000, seed=1)])
    expected = dict(engine.selected[0])
    engine.forget_prefixes()
    engine.generate([random_prompt(2000, seed=2), random_prompt(700, seed=3), random_prompt(3000, seed=1)])
    engine.set_chunk(OPTIONS["max_num_batched_tokens"])
    # the longest request alone has these positions
    for position in range(2100, 3000):
        assert engine.selected[0][position] == expected[position]


def test_a_step_never_waits_for_the_gpu(served, monkeypatch):
    _, engine = served

    def without_sync(method):
        def call(*args):
            mode = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                return method(*args)
            finally:
                torch.cuda.set_sync_debug_mode(mode)

        return call

    prompts = [random_prompt(2000), random_prompt(90)]
    engine.forget_prefixes()
    engine.generate(prompts)  # compiles what is compiled at first use
    engine.forget_prefixes()
    monkeypatch.setattr(Indexer, "update_statistics", without_sync(Indexer.update_statistics))
    monkeypatch.setattr(engine.recorder, "select", without_sync(engine.recorder.select))
    engine.generate(prompts)
