"""A request with a seed draws the same tokens however its prompt was cut into chunks."""

import pytest
from vllm import SamplingParams

from tests.engine.conftest import ON_GPU, random_prompt


@pytest.mark.skipif(ON_GPU, reason="stock attention rounds by the chunk there, which a sampled token may show")
@pytest.mark.parametrize("chunk", [64, 100])
def test_seed_and_chunked_prefill(start_engine, deepseek_model, chunk):
    engine = start_engine(deepseek_model)
    drawn = []
    for tokens_a_step in (8192, chunk):
        engine.set_chunk(tokens_a_step)
        engine.forget_prefixes()
        output = engine.llm.generate(
            [{"prompt_token_ids": random_prompt(300)}],
            SamplingParams(temperature=1, seed=11, max_tokens=12, ignore_eos=True),
            use_tqdm=False,
        )
        drawn.append(list(output[0].outputs[0].token_ids))
    assert drawn[0] == drawn[1]
