"""The trained model's tokenizer in plain Python, for machines without the `tokenizers` package.

It reads tokenizer.json and encodes as that package does (a test compares them): split by `PATTERN`, write the bytes
in the printable alphabet of byte-level BPE, then merge pairs in the order they were learnt.
"""

import functools
import json
from pathlib import Path

from misa_vllm.models.tiny import BOS, EOS, SPECIAL_TOKENS

END = EOS
__all__ = ["BOS", "END", "PATTERN", "SPECIAL_TOKENS", "Encoder"]

# Words and punctuation take the space before them, line ends and digits stand alone: a number of six digits is
# always six tokens, however it is written.
PATTERN = r" ?[A-Za-z]+|[0-9]|\n| +(?=\n)| ?[^\sA-Za-z0-9]+|\s"


@functools.cache
def byte_alphabet() -> dict[int, str]:
    """The printable character that byte-level BPE writes for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


class Encoder:
    """Text to token ids and back."""

    def __init__(self, tokenizer: Path) -> None:
        """Read tokenizer.json.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no byte-level BPE tokenizer of this package.
        """
        import re

        try:
            model = json.loads(Path(tokenizer).read_text(encoding="utf-8"))["model"]
            merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
            self.ids: dict[str, int] = model["vocab"]
        except (KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{tokenizer} is no BPE tokenizer: make it with misa_vllm.train.corpus") from error
        self._rank = {pair: rank for rank, pair in enumerate(merges)}
        self._split = re.compile(PATTERN).findall
        self._tokens = {number: token for token, number in self.ids.items()}
        self._bytes = {character: byte for byte, character in byte_alphabet().items()}
        self._word = functools.lru_cache(maxsize=100_000)(self._encode_word)

    def __len__(self) -> int:
        return len(self.ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; the names of special tokens in it are ordinary text."""
        return [number for word in self._split(text) for number in self._word(word)]

    def decode(self, ids) -> str:
        """The text of token ids; special tokens are left out."""
        known = (self._tokens[int(number)] for number in ids if int(number) >= len(SPECIAL_TOKENS))
        return bytes(self._bytes[character] for token in known for character in token).decode("utf-8", "replace")

    def _encode_word(self, word: str) -> tuple[int, ...]:
        alphabet = byte_alphabet()
        parts = [alphabet[byte] for byte in word.encode("utf-8")]
        never = len(self._rank)
        while len(parts) > 1:
            ranks = [self._rank.get(pair, never) for pair in zip(parts, parts[1:], strict=False)]
            best = min(ranks)
            if best == never:
                break
            merged, i = [], 0
            pair = (parts[ranks.index(best)], parts[ranks.index(best) + 1])
            while i < len(parts):
                if tuple(parts[i : i + 2]) == pair:
                    merged.append(parts[i] + parts[i + 1])
                    i += 2
                else:
                    merged.append(parts[i])
                    i += 1
            parts = merged
        return tuple(self.ids[part] for part in parts)
