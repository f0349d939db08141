"""Tensor parallelism shares out the rows of a long prefill: every rank scores its part, then all have all."""

import pytest
import torch

from misa_vllm.indexer import Indexer
from tests.engine.conftest import ON_DEVICE, allow_ranks, greedy, offline_engine, random_prompt, write_model

PROMPT = 33_000  # rows of one step; vLLM shares them out from 16384 a rank on
EVERY = 61


class SelectionWorker:
    """Methods for vLLM's worker processes (`worker_extension_cls`)."""

    def count_rows(self) -> None:
        self.rows, select = [], Indexer.select

        def counted(indexer, q, *args):
            self.rows.append(len(q))
            return select(indexer, q, *args)

        Indexer.select = counted

    def selection(self) -> tuple[int, list[list[int]]]:
        """The most rows of a call, and what some rows of the last step attend to."""
        chosen = self.get_model().model.topk_indices_buffer[:PROMPT:EVERY]
        return max(self.rows), chosen.sort(dim=1).values.tolist()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_shared_out_rows_select_as_one_rank_does(tmp_path, monkeypatch):
    allow_ranks(monkeypatch)
    model = write_model(tmp_path / "model", layers=1)
    options = {
        **ON_DEVICE,
        "max_model_len": PROMPT + 100,
        "max_num_batched_tokens": PROMPT + 100,
        "worker_extension_cls": f"{SelectionWorker.__module__}.{SelectionWorker.__qualname__}",
    }
    ranks = {}
    for size in (1, 2):
        with offline_engine(model, {"pool_block": 64}, tensor_parallel_size=size, **options) as llm:
            llm.collective_rpc("count_rows")
            greedy(llm, [random_prompt(PROMPT)], tokens=1)
            ranks[size] = llm.collective_rpc("selection")
    ((most, expected),) = ranks[1]
    assert most == PROMPT
    assert len(ranks[2]) == 2
    for most, selected in ranks[2]:
        assert most < PROMPT, "a rank scored every row"
        assert selected == expected
