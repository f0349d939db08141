"""Speculative decoding with the model's own multi-token-prediction layer: drafts that are rejected leave no trace."""

import pytest
import torch

from misa_vllm.index_cache import PAGE_TOKENS, means_view
from misa_vllm.reference import update_page_means
from tests.engine.conftest import ON_GPU, TOPK, agreement, random_prompt, write_model

PROMPT = TOPK + 120  # the tokens decoded after it complete a page, which is a pool block, and route by it
TOKENS = 90
LAYERS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "mtp", layers=LAYERS, mtp_layers=1)


def generate(engine):
    """The tokens, what every layer of the model selected, and the bytes of every complete page, layer by layer."""
    tokens = engine.generate([random_prompt(PROMPT)], tokens=TOKENS)
    complete = engine.recorder.block_table[0, : (PROMPT + TOKENS) // PAGE_TOKENS].long()
    pages = [cache[complete.to(cache.device)].cpu() for cache in engine.index_caches[:LAYERS]]
    return tokens, [dict(layer) for layer in engine.selected[:LAYERS]], pages


@pytest.fixture(scope="module")
def alone(start_engine, model):
    return generate(start_engine(model))


@pytest.mark.parametrize("drafted", [1, 2])
def test_rejected_drafts_leave_no_trace(start_engine, model, alone, drafted):
    engine = start_engine(model, speculative_config={"method": "mtp", "num_speculative_tokens": drafted})
    tokens, selected, pages = generate(engine)
    computed = [position for position, _ in engine.history[0]]
    assert len(computed) > len(set(computed)), "every draft was accepted"
    assert len(computed) < PROMPT + (TOKENS - 1) * (drafted + 1), "no draft was accepted"
    assert len(engine.selected) == LAYERS + 1, "the draft's layer selects by another indexer"
    for layer in pages:
        recomputed = layer.clone()
        update_page_means(recomputed, torch.arange(len(layer) * PAGE_TOKENS))
        torch.testing.assert_close(means_view(layer), means_view(recomputed), rtol=PAGE_TOKENS * 2**-24, atol=1e-6)
    last = min(max(alone[1][0]), PROMPT + agreement(tokens[0], alone[0][0]) - 1)
    for layer, wanted in list(zip(selected, alone[1], strict=True))[: 1 if ON_GPU else None]:
        assert all(layer[position] == wanted[position] for position in range(last + 1))
    if not ON_GPU:
        assert tokens == alone[0]
        assert all(map(torch.equal, pages, alone[2]))
