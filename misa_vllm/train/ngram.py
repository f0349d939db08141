"""Perplexity of a unigram and a trigram model on the held-out text: what a model that learnt anything must beat.

    python -m misa_vllm.train.ngram .cache/corpus

The unigram model has the training text's counts plus one. The trigram model is interpolated Kneser-Ney with one
discount for all orders (Chen and Goodman, 1998, section 2.7), counted on the same training text.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

DISCOUNT = 0.75


class Counts:
    """How often each of some numbers occurs; look-up by binary search."""

    def __init__(self, keys: np.ndarray) -> None:
        self.keys, self.counts = np.unique(keys, return_counts=True)

    def __getitem__(self, keys: np.ndarray) -> np.ndarray:
        place = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[place] == keys, self.counts[place], 0).astype(np.float64)


def unigram_perplexity(train: np.ndarray, held_out: np.ndarray, vocabulary: int) -> float:
    """Perplexity per token of `held_out` with add-one counts of `train`."""
    share = np.bincount(train, minlength=vocabulary) + 1.0
    return float(np.exp(-np.log(share / share.sum())[held_out].mean()))


def trigram_probabilities(train: np.ndarray, held_out: np.ndarray, vocabulary: int) -> np.ndarray:
    """P of each token of `held_out` from its third on, given the two before; interpolated Kneser-Ney on `train`."""
    v = np.int64(vocabulary)
    a, b, c = (held_out[i : len(held_out) - 2 + i].astype(np.int64) for i in range(3))
    train = train.astype(np.int64)
    trigrams = Counts((train[:-2] * v + train[1:-1]) * v + train[2:])
    # counts of histories, and how many different tokens follow each
    history = Counts(train[:-2] * v + train[1:-1])
    followers = Counts(trigrams.keys // v)
    # lower orders count the different contexts a gram stands in, not how often it does
    bigrams = Counts(trigrams.keys % (v * v))
    bigram_keys = bigrams.keys
    bigram_total = np.bincount(bigram_keys // v, weights=bigrams.counts, minlength=vocabulary)
    bigram_followers = np.bincount(bigram_keys // v, minlength=vocabulary)
    contexts = np.bincount(bigram_keys % v, minlength=vocabulary).astype(np.float64)

    kinds = max(1, np.count_nonzero(contexts))
    unigram = (contexts - DISCOUNT).clip(min=0) + DISCOUNT * kinds / v
    unigram /= contexts.sum()

    def interpolated(count, total, kinds, lower):
        seen = total > 0
        total = np.where(seen, total, 1.0)
        return np.where(seen, ((count - DISCOUNT).clip(min=0) + DISCOUNT * kinds * lower) / total, lower)

    of_two = interpolated(bigrams[b * v + c], bigram_total[b], bigram_followers[b], unigram[c])
    pair = a * v + b
    return interpolated(trigrams[pair * v + c], history[pair], followers[pair], of_two)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m misa_vllm.train.ngram", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder of misa_vllm.train.corpus")
    options = parser.parse_args(arguments)
    try:
        train, held_out = (np.fromfile(options.folder / f"{name}.bin", np.uint16) for name in ("train", "heldout"))
        vocabulary = len(json.loads((options.folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    except (OSError, KeyError, json.JSONDecodeError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    result = {
        "unigram": unigram_perplexity(train, held_out, vocabulary),
        "trigram": float(np.exp(-np.log(trigram_probabilities(train, held_out, vocabulary)).mean())),
        "train_tokens": len(train), "heldout_tokens": len(held_out),
    }  # fmt: skip
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
