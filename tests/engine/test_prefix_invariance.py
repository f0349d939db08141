"""A token's selection depends on its prefix alone, however the engine came to compute it (design, invariant 1).

On GPUs stock attention rounds a query by how many share its launch, so what the second layer is asked already
differs; there the first layer, whose input does not depend on attention, is compared.
"""

import pytest

from tests.engine.conftest import ON_GPU, TOPK, agreement, random_prompt

PROMPT = TOPK + 636  # several pages and pool blocks past top-k, and a partial page at the end


@pytest.fixture(scope="module", params=["misa", "misa mean_positive", "hierarchical", "hisa"])
def engine(request, start_engine, deepseek_model):
    options = {"policy": request.param, "active_heads": 8}
    if request.param == "misa mean_positive":
        options |= {"policy": "misa", "statistic": "mean_positive"}
    elif request.param == "hierarchical":
        options["candidates"] = 2 * TOPK
    elif request.param == "hisa":
        options["candidates"] = (TOPK // 128 + 3) * 128  # blocks: the first, the newest and the best of the others
    return start_engine(deepseek_model, options)


@pytest.fixture(scope="module")
def whole(engine):
    """Tokens and selections with the prompt prefilled in one step."""
    tokens = engine.generate([random_prompt(PROMPT)])
    return tokens, [dict(layer) for layer in engine.selected]


@pytest.fixture(autouse=True)
def nothing_computed_yet(engine, whole):
    engine.set_chunk(8192)
    engine.forget_prefixes()


def assert_same(selected, expected):
    """Every position of `expected` selected the same tokens."""
    for layer, wanted in list(zip(selected, expected, strict=True))[: 1 if ON_GPU else None]:
        assert {position: layer[position] for position in wanted} == wanted


def assert_same_run(tokens, selected, whole):
    """Tokens and selections are those of `whole`; on GPUs, selections up to where attention's rounding shows."""
    assert ON_GPU or tokens == whole[0]
    end = PROMPT + agreement(tokens[0], whole[0][0])
    assert_same(selected, [{at: chosen for at, chosen in layer.items() if at < end} for layer in whole[1]])


def test_routing_is_active_and_selects_topk(engine, whole):
    for layer in whole[1]:
        assert sorted(layer) == list(range(PROMPT + 7))
        for position, tokens in layer.items():
            assert len(tokens) == min(position + 1, TOPK)
            assert max(tokens) <= position


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunked_prefill_equals_whole(engine, whole, chunk):
    engine.set_chunk(chunk)
    tokens = engine.generate([random_prompt(PROMPT)])
    assert_same_run(tokens, engine.selected, whole)


def test_decode_equals_prefill(engine, whole):
    continued = random_prompt(PROMPT) + whole[0][0]
    engine.generate([continued], tokens=1)
    decoded = [{position: layer[position] for position in range(PROMPT, PROMPT + 7)} for layer in whole[1]]
    assert_same(engine.selected, decoded)


def test_prefix_hit_equals_whole(engine, whole):
    prompt = random_prompt(PROMPT)
    engine.generate([prompt[:-200]], tokens=1)
    tokens = engine.generate([prompt])
    hit = min(engine.selected[0])
    assert hit >= PROMPT - 200 - 64, "the shared prefix was computed again"
    assert ON_GPU or tokens == whole[0]
    assert_same(engine.selected, [{position: layer[position] for position in range(hit, PROMPT)} for layer in whole[1]])


def test_batch_equals_alone(engine, whole):
    prompts = [random_prompt(333, seed=1), random_prompt(65, seed=2), random_prompt(PROMPT)]
    alone = []
    for prompt in prompts:
        engine.forget_prefixes()
        alone += engine.generate([prompt])
    engine.forget_prefixes()
    engine.set_chunk(256)
    together = engine.generate(prompts)
    assert ON_GPU or together == alone


def test_unused_bytes_of_the_cache_do_not_matter(engine, whole):
    for cache in engine.index_caches:
        cache.fill_(0xFF)  # NaN, read as a key, a scale or a mean
    tokens = engine.generate([random_prompt(PROMPT)])
    assert_same_run(tokens, engine.selected, whole)


def test_lengths_at_every_border(engine):
    """Around a page, top-k and two pages: as a batch and alone."""
    lengths = sorted({1, 63, 64, 65, TOPK - 1, TOPK, TOPK + 1, 127, 128, 129})
    prompts = [random_prompt(length, seed=length) for length in lengths]
    together = engine.generate(prompts, tokens=3)
    for layer in engine.history:
        assert len(layer) == sum(lengths) + 2 * len(lengths)
        for position, tokens in layer:
            assert len(tokens) == min(position + 1, TOPK)
            assert max(tokens) <= position
    engine.forget_prefixes()
    alone = [engine.generate([prompt], tokens=3)[0] for prompt in prompts]
    assert ON_GPU or together == alone
