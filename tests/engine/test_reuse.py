"""Layers that reuse the selection of an earlier one: they have no indexer, hence neither routing nor statistics."""

import pytest

from tests.engine.conftest import TOPK, random_prompt, write_model

PROMPT = TOPK + 136


@pytest.mark.parametrize(
    "reuse",
    [{"index_topk_freq": 2, "index_skip_topk_offset": 1}, {"index_topk_pattern": "FSFS"}],
    ids=["every second layer", "pattern"],
)
def test_layers_that_reuse_a_selection(start_engine, tmp_path, reuse):
    engine = start_engine(write_model(tmp_path / "model", layers=4), hf_overrides=reuse)
    engine.generate([random_prompt(PROMPT)])
    assert len(engine.index_caches) == 2
    assert len(engine.selected) == 2
    for layer in engine.selected:
        assert sorted(layer) == list(range(PROMPT + 7))
