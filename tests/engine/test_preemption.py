"""Requests that lose their pages and are recomputed give the same tokens and selections; no page is lost."""

import pytest

from tests.engine.conftest import ON_GPU, TOPK, agreement, random_prompt

PROMPT = TOPK + 536
TOKENS = 200
PAGES = 2 * (-(-(PROMPT + TOKENS) // 64))
"""One less than both requests need at their end: the pool keeps a page for itself."""


@pytest.fixture(scope="module")
def engine(start_engine, deepseek_model):
    return start_engine(
        deepseek_model, max_model_len=PROMPT + TOKENS, num_gpu_blocks_override=PAGES, enable_prefix_caching=False
    )


def test_preempted_request_recovers(engine):
    prompts = [random_prompt(PROMPT, seed=3), random_prompt(PROMPT, seed=4)]
    alone, selections = [], []
    for prompt in prompts:
        alone += engine.generate([prompt], tokens=TOKENS)
        selections.append([dict(layer) for layer in engine.selected])
    free = engine.free_pages
    preempted = []
    preempt = engine.scheduler._preempt_request

    def count(request, *args, **kwargs):
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    engine.scheduler._preempt_request = count
    try:
        together = engine.generate(prompts, tokens=TOKENS)
    finally:
        engine.scheduler._preempt_request = preempt
    assert preempted, "the pool was large enough for both: nothing was preempted"
    assert ON_GPU or together == alone
    end = PROMPT + min(map(agreement, together, alone))
    for number, layer in enumerate(engine.history[: 1 if ON_GPU else None]):
        assert len(layer) > sum(len(selection[number]) for selection in selections), "nothing was computed again"
        for position, tokens in layer:
            assert position >= end or tokens in [selection[number].get(position) for selection in selections]
    assert engine.free_pages == free
