"""Requests that lose their pages and are recomputed give the same tokens and selections; no page is lost."""

import copy

import pytest

from tests.engine.conftest import random_prompt

PAGES = 26


@pytest.fixture(scope="module")
def engine(start_engine, deepseek_model):
    return start_engine(
        deepseek_model, max_model_len=1024, num_gpu_blocks_override=PAGES, enable_prefix_caching=False
    )


def test_preempted_request_recovers(engine):
    prompts = [random_prompt(600, seed=3), random_prompt(620, seed=4)]
    alone, selections = [], []
    for prompt in prompts:
        alone += engine.generate([prompt], tokens=200)
        selections.append(copy.deepcopy(engine.selected))
    free = engine.free_pages
    preempted = []
    preempt = engine.scheduler._preempt_request

    def count(request, *args, **kwargs):
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    engine.scheduler._preempt_request = count
    try:
        # 2 x 13 pages at the end and one page that the pool keeps for itself do not fit into 26
        together = engine.generate(prompts, tokens=200)
    finally:
        engine.scheduler._preempt_request = preempt
    assert preempted, "the pool was large enough for both: nothing was preempted"
    assert together == alone
    assert engine.free_pages == free
