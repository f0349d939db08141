"""Layers that reuse the selection of an earlier one: they have no indexer, hence neither routing nor statistics."""

import pytest
from safetensors.torch import load_file, save_file

from tests.engine.conftest import TOPK, random_prompt, write_model

PROMPT = TOPK + 136


@pytest.mark.parametrize(
    "reuse",
    [{"index_topk_freq": 2, "index_skip_topk_offset": 1}, {"index_topk_pattern": "FSFS"}],
    ids=["every second layer", "pattern"],
)
def test_layers_that_reuse_a_selection(start_engine, tmp_path, reuse):
    model = write_model(tmp_path / "model", layers=4)
    # as real checkpoints of this kind, which vLLM's model on GPUs takes for granted: no indexer where none is asked
    weights = {
        name: weight
        for name, weight in load_file(tmp_path / "model" / "model.safetensors").items()
        if not name.startswith(("model.layers.1.self_attn.indexer", "model.layers.3.self_attn.indexer"))
    }
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    engine = start_engine(model, hf_overrides=reuse)
    engine.generate([random_prompt(PROMPT)])
    assert len(engine.index_caches) == 2
    assert len(engine.selected) == 2
    for layer in engine.selected:
        assert sorted(layer) == list(range(PROMPT + 7))
