"""Batches by number: what step n of a stage trains on depends on the seed alone, not on who makes it or when.

Free of torch, so that the processes which make batches start at once.
"""

import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from misa_vllm.train.plan import Stage
from misa_vllm.train.tasks import NOT_SCORED, TEXT, Corpus, Sample, make_batch

PREFETCH = 24
PATIENCE_S = 300  # for one batch

_corpus: Corpus | None = None


def start_worker(folder: Path) -> None:
    """Read the corpus into this process."""
    global _corpus
    _corpus = Corpus.read(folder)


def number_of(text: str) -> int:
    """A number from a text, the same in every process."""
    return zlib.crc32(text.encode())


def make(stage: Stage, seed: str) -> tuple[Sample, np.ndarray | None]:
    """A step's sequences, and the queries [B, R] at which the indexer learns, up to half where answers are foretold.

    Queries are counted from the end of the stage's context.
    """
    count = max(1, stage.tokens // stage.length)
    batch = make_batch(_corpus, stage.mix, stage.length, count, seed, stage.context)
    if not stage.kl_rows:
        return batch, None
    rng = np.random.default_rng(number_of(seed))
    rows = np.empty((count, stage.kl_rows), np.int64)
    for b in range(count):
        targets = batch.tasks[b, 1 + stage.context :]
        answers = rng.permutation(np.flatnonzero((targets != TEXT) & (targets != NOT_SCORED)))[: stage.kl_rows // 2]
        others = rng.choice(stage.length - stage.context, stage.kl_rows - len(answers), replace=False)
        rows[b] = np.concatenate([answers, others])
    return batch, rows


def stream(seed: str, stage: Stage, first: int, pool=None) -> Iterator[tuple[Sample, np.ndarray | None]]:
    """Batches number `first`, `first` + 1, ... of a stage; a pool of started workers makes some of them ahead."""
    number = first
    if pool is None:
        while True:
            yield make(stage, f"{seed}/{stage.name}/{number}")
            number += 1
    waiting: deque = deque()
    while True:
        while len(waiting) < PREFETCH:
            waiting.append(pool.apply_async(make, (stage, f"{seed}/{stage.name}/{number}")))
            number += 1
        yield waiting.popleft().get(timeout=PATIENCE_S)
