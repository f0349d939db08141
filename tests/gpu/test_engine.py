"""`--attention-backend misa` in vLLM's fused DSA path on a GPU: against stock, and in every serving mode."""

import copy
import gc

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from misa_vllm.indexer import Indexer
from tests.engine.conftest import TOPK, Engine, random_prompt, write_model

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
OPTIONS = {"max_model_len": 45056, "max_num_batched_tokens": 8192, "gpu_memory_utilization": 0.3}


def generate(model, prompts, misa=None, **options):
    """Greedy tokens of stock vLLM (misa None) or under the backend, CUDA graphs on."""
    if misa is not None:
        options = {"attention_backend": "misa", "additional_config": {"misa": misa}, **options}
    llm = LLM(model, **{**OPTIONS, **options})
    try:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], GREEDY, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def prompts():
    """64 prompts of 3K to 40K tokens."""
    return [random_prompt(3000 + 587 * i, seed=i) for i in range(64)]


@pytest.mark.parametrize("model", ["deepseek_model", "glm_model"])
def test_dsa_generates_stocks_tokens(model, prompts, request):
    model = request.getfixturevalue(model)
    assert generate(model, prompts, {"policy": "dsa"}) == generate(model, prompts)


@pytest.mark.parametrize("options", [{}, {"kv_cache_dtype": "fp8"}], ids=["bf16", "fp8 KV cache"])
@pytest.mark.parametrize("policy", ["misa", "hierarchical"])
def test_graphs_generate_what_eager_does(deepseek_model, policy, options):
    prompts = [random_prompt(n, seed=n) for n in (100, TOPK + 1, 3000, 9000)]
    misa = {"policy": policy, "pool_block": 64, "candidates": 2 * TOPK}
    graphs = generate(deepseek_model, prompts, misa, max_num_seqs=4, **options)
    assert graphs == generate(deepseek_model, prompts, misa, max_num_seqs=4, enforce_eager=True, **options)


def test_mixed_batches_select_as_alone(start_engine, deepseek_model):
    """Prefills join running decodes; the first layer's selections are those of each request alone."""
    engine = start_engine(deepseek_model)
    engine.set_chunk(512)
    engine.generate([random_prompt(3000, seed=1)])
    expected = copy.deepcopy(engine.selected[0])
    engine.forget_prefixes()
    engine.generate([random_prompt(2000, seed=2), random_prompt(700, seed=3), random_prompt(3000, seed=1)])
    # the longest request alone has these positions
    for position in range(2100, 3000):
        assert engine.selected[0][position] == expected[position]


def test_layers_that_reuse_a_selection_neither_route_nor_keep_statistics(tmp_path):
    model = write_model(tmp_path / "reuse", layers=4)
    engine = Engine(model, {}, hf_overrides={"index_topk_freq": 2, "index_skip_topk_offset": 1})
    try:
        engine.generate([random_prompt(3000)])
        assert len(engine.selected) == 2
        caches = engine.llm.llm_engine.vllm_config.compilation_config.static_forward_context
        assert sum(name.endswith("indexer.k_cache") for name in caches) == 2
    finally:
        engine.close()


def test_a_step_never_waits_for_the_gpu(start_engine, deepseek_model, monkeypatch):
    engine = start_engine(deepseek_model)
    update, select = Indexer.update_statistics, engine._select

    def without_sync(method):
        def call(*args):
            mode = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                return method(*args)
            finally:
                torch.cuda.set_sync_debug_mode(mode)

        return call

    engine.generate([random_prompt(2000)])  # compiles what is compiled at first use
    engine.forget_prefixes()
    monkeypatch.setattr(Indexer, "update_statistics", without_sync(update))
    monkeypatch.setattr(engine, "_select", without_sync(select))
    engine.generate([random_prompt(2000)])
