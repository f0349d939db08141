"""What the options mean, seen from generated tokens and selections."""

import pytest

from tests.engine.conftest import ON_GPU, TOPK, random_prompt

PROMPT = random_prompt(TOPK + 836, seed=5)


def run(start_engine, model, **misa):
    engine = start_engine(model, misa)
    tokens = engine.generate([PROMPT])
    return tokens, [dict(layer) for layer in engine.selected]


@pytest.fixture(scope="module", params=["deepseek_model", "glm_model"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def dsa(start_engine, model):
    if ON_GPU:  # there policy dsa is stock's own code, whose selections are not recorded
        return run(start_engine, model, policy="misa", min_context=10**6)
    return run(start_engine, model, policy="dsa")


@pytest.mark.parametrize("statistic", ["mean", "mean_positive"])
def test_all_heads_is_dsa(start_engine, model, dsa, statistic):
    heads = 32 if "glm" in model else 64
    assert run(start_engine, model, policy="misa", active_heads=heads, statistic=statistic) == dsa


def test_hierarchical_over_everything_is_dsa(start_engine, model, dsa):
    assert run(start_engine, model, policy="hierarchical", active_heads=1, candidates=8192) == dsa


def test_min_context_keeps_earlier_tokens_exact(start_engine, model, dsa):
    _, selected = run(start_engine, model, policy="misa", active_heads=1, min_context=TOPK + 536)
    # the first layer's input does not depend on what any layer selected
    differing = [position for position in range(len(PROMPT)) if selected[0][position] != dsa[1][0][position]]
    assert differing, "one head selects what all heads select: the model cannot tell policies apart"
    assert min(differing) >= TOPK + 535


@pytest.mark.skipif(ON_GPU, reason="there stock's kernels decode, and their selections are not recorded")
def test_exact_decode_routes_prefills_only(start_engine, deepseek_model):
    """First layer: the prompt as without the option, what is decoded as under policy dsa, beside a prefill or not."""
    routed = run(start_engine, deepseek_model, policy="misa")[1][0]
    engine = start_engine(deepseek_model, {"policy": "misa", "exact_decode": True})
    alone = engine.generate([PROMPT], tokens=12)
    assert all(engine.selected[0][position] == routed[position] for position in range(len(PROMPT)))
    engine.forget_prefixes()
    engine.set_chunk(256)
    beside = engine.generate([PROMPT, PROMPT[:600]], tokens=12)
    assert beside[0] == alone[0]
    selected = dict(engine.selected[0])
    engine = start_engine(deepseek_model, {"policy": "dsa"})
    engine.generate([PROMPT + alone[0]], tokens=1)
    decoded = range(len(PROMPT), len(PROMPT) + 11)
    assert all(selected[position] == engine.selected[0][position] for position in decoded)


def test_routing_recovers_most_of_dsa(start_engine, model, dsa):
    """More routed heads select more of what all heads select (first layer, past top-k)."""

    def recall(active_heads):
        _, selected = run(start_engine, model, policy="misa", active_heads=active_heads)
        positions = range(TOPK, len(PROMPT))
        return sum(len(selected[0][p] & dsa[1][0][p]) for p in positions) / (TOPK * len(positions))

    few, many = recall(1), recall(16)
    assert few < many < 1
