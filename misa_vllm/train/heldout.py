"""Held-out text as files, for the tools of `misa_vllm.eval`.

    python -m misa_vllm.train.heldout .cache/corpus .cache/texts

writes part-0.txt, part-1.txt, ...: the held-out documents, one after the other, in parts of equally many tokens.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from misa_vllm.train.bpe import END, Encoder

PARTS, TOKENS = 5, 140_000  # a little more than the longest prompt has


def write(corpus: Path, folder: Path, parts: int = PARTS, tokens: int = TOKENS) -> list[Path]:
    """Write the texts; returns the files.

    Raises:
        OSError: the corpus cannot be read, or the folder not written.
        ValueError: there is not so much held-out text.
    """
    encoder = Encoder(corpus / "tokenizer.json")
    ids = np.fromfile(corpus / "heldout.bin", dtype=np.uint16)
    if parts * tokens > len(ids):
        raise ValueError(f"{corpus} holds {len(ids)} held-out tokens: choose fewer than {parts} parts of {tokens}")
    folder.mkdir(parents=True, exist_ok=True)
    end = encoder.ids[END]
    files = []
    for number, part in enumerate(ids[: parts * tokens].reshape(parts, tokens)):
        documents = np.split(part, np.flatnonzero(part == end))
        files.append(folder / f"part-{number}.txt")
        files[-1].write_text("\n\n".join(encoder.decode(document) for document in documents), encoding="utf-8")
    return files


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m misa_vllm.train.heldout", description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path, help="folder of misa_vllm.train.corpus")
    parser.add_argument("folder", type=Path, help="where the texts go")
    parser.add_argument("--parts", type=int, default=PARTS, help=f"default {PARTS}")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of each part, default {TOKENS}")
    options = parser.parse_args(arguments)
    try:
        for file in write(options.corpus, options.folder, options.parts, options.tokens):
            print(f"{file}: {file.stat().st_size / 1e3:.0f} kB")
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
