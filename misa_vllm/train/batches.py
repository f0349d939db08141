"""Batches by number: what step n of a stage trains on depends on the seed alone, not on who makes it or when.

Free of torch, so that the processes which make batches start at once.
"""

import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Batch:
    """What one step trains on."""

    sample: Sample
    """Arrays of [B, length + 1]."""
    positions: np.ndarray
    """[length] int64, ascending, the same for all sequences."""
    rows: np.ndarray | None
    """[B, R] int64, counted from the end of the stage's context: queries at which the indexer learns."""


def leaping(rng: np.random.Generator, length: int, last: int) -> np.ndarray:
    """Positions of `length` tokens that leap ahead at one to three places, by less and more, and end by `last`."""
    steps = np.ones(length, np.int64)
    steps[0] = 0
    room = last - length
    for place in rng.integers(1, length, rng.integers(1, 4)):
        leap = int(room ** rng.random())  # small leaps as often as large ones
        steps[place] += leap
        room = max(1, room - leap)
    return steps.cumsum()


def make(stage: Stage, seed: str, last: int) -> Batch:
    """The batch of a step; `last` is the highest position of the model. Up to half of its rows foretell answers."""
    count = stage.sequences
    batch = make_batch(_corpus, stage.mix, stage.length, count, seed, stage.context)
    rng = np.random.default_rng(number_of(seed))
    skips = rng.random() < stage.skips and stage.length + 1 < last
    positions = leaping(rng, stage.length, last) if skips else np.arange(stage.length)
    if not stage.kl_rows:
        return Batch(batch, positions, None)
    rows = np.empty((count, stage.kl_rows), np.int64)
    for b in range(count):
        targets = batch.tasks[b, 1 + stage.context :]
        answers = rng.permutation(np.flatnonzero((targets != TEXT) & (targets != NOT_SCORED)))[: stage.kl_rows // 2]
        others = rng.choice(stage.length - stage.context, stage.kl_rows - len(answers), replace=False)
        rows[b] = np.concatenate([answers, others])
    return Batch(batch, positions, rows)


def stream(seed: str, stage: Stage, first: int, last: int, pool=None) -> Iterator[Batch]:
    """Batches number `first`, `first` + 1, ... of a stage; a pool of started workers makes some of them ahead."""
    number = first
    if pool is None:
        while True:
            yield make(stage, f"{seed}/{stage.name}/{number}", last)
            number += 1
    waiting: deque = deque()
    while True:
        while len(waiting) < PREFETCH:
            waiting.append(pool.apply_async(make, (stage, f"{seed}/{stage.name}/{number}", last)))
            number += 1
        yield waiting.popleft().get(timeout=PATIENCE_S)
