"""Two tensor-parallel ranks, each with an indexer of its own, select what one does."""

import pytest
import torch

from tests.engine.conftest import ON_DEVICE, ON_GPU, TOPK, allow_ranks, greedy, offline_engine, random_prompt
from tests.engine.recorder import RecordingWorker

PROMPT = random_prompt(TOPK + 236)
TOKENS = 16
# in float32 on CPU, the ranks' partial sums round too finely to change a greedy token
OPTIONS = {"max_model_len": 1024, "max_num_seqs": 4, "enforce_eager": True, **({} if ON_GPU else {"dtype": "float32"})}


@pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_select_what_one_does(start_engine, deepseek_model, monkeypatch):
    engine = start_engine(deepseek_model, **OPTIONS)
    expected = engine.generate([PROMPT], tokens=TOKENS)
    selected = dict(engine.selected[0])
    allow_ranks(monkeypatch)
    worker = f"{RecordingWorker.__module__}.{RecordingWorker.__qualname__}"
    options = {**ON_DEVICE, **OPTIONS, "tensor_parallel_size": 2, "worker_extension_cls": worker}
    with offline_engine(deepseek_model, {"pool_block": 64}, **options) as llm:
        llm.collective_rpc("start_recording")
        tokens = greedy(llm, [PROMPT], TOKENS)
        ranks = llm.collective_rpc("recorded")
    assert len(ranks) == 2
    prompt = range(len(PROMPT))
    for layers in ranks:  # the first layer's input has met no sum over ranks
        assert [layers[0][position] for position in prompt] == [selected[position] for position in prompt]
    assert ON_GPU or tokens == expected
