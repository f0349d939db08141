"""What an engine's indexers selected, recorded in the process that computed it."""

import torch

from misa_vllm.indexer import Indexer


class Recorder:
    """Records every call of `Indexer.select` in this process until `close`."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.selected: list[dict[int, frozenset[int]]] = []
        """Per layer, {position: tokens} of the query computed last at a position."""
        self.history: list[list[tuple[int, frozenset[int]]]] = []
        """Per layer, (position, tokens) of every query computed, in order."""
        self.block_table = torch.empty(0, 0, dtype=torch.int32)
        """The pages of the last step's requests."""
        self.select = Indexer.select
        recorder = self

        def select(indexer, q, gates, index_cache, rows, out, exact=False):
            recorder.select(indexer, q, gates, index_cache, rows, out, exact)
            recorder.record(indexer, rows, out)

        Indexer.select = select

    def record(self, indexer: Indexer, rows, out: torch.Tensor) -> None:
        if id(indexer) not in self.layers:
            self.layers.append(id(indexer))
            self.selected.append({})
            self.history.append([])
        number = self.layers.index(id(indexer))
        self.block_table = rows.block_table.cpu().clone()
        for visible, tokens in zip(rows.visible.tolist(), out.tolist(), strict=True):
            if visible:  # rows that pad a batch see nothing
                chosen = frozenset(token for token in tokens if token >= 0)
                self.selected[number][visible - 1] = chosen
                self.history[number].append((visible - 1, chosen))

    def clear(self) -> None:
        for layer in (*self.selected, *self.history):
            layer.clear()

    def close(self) -> None:
        Indexer.select = self.select


class RecordingWorker:
    """Methods for vLLM's worker processes (`worker_extension_cls`)."""

    def start_recording(self) -> None:
        self.recorder = Recorder()

    def recorded(self) -> list[dict[int, frozenset[int]]]:
        return self.recorder.selected
