"""From a checkpoint to what is shipped or served.

    python -m misa_vllm.train.export CHECKPOINT --data CORPUS --packed misa_vllm/data/trained --figures evaluation.json

writes what the package carries, the int8 form and its card, filled from what `misa_vllm.train.evaluate` measured;

    python -m misa_vllm.train.export CHECKPOINT --data CORPUS --model FOLDER      bfloat16 Hugging Face folder
    python -m misa_vllm.train.export CHECKPOINT --data CORPUS --compare           perplexity of float32 and int8
"""

import argparse
import json
import sys
from pathlib import Path

from misa_vllm.models import trained
from misa_vllm.train import checkpoint
from misa_vllm.train.card import write_card
from misa_vllm.train.size import DENSE, SPARSE

CARD = "README.md"


def compare(model, tokens, length: int, windows: int) -> dict[str, float]:
    """Held-out perplexity of the model and of what its packed form unpacks to, dense and sparse."""
    from misa_vllm.train.evaluate import perplexity
    from misa_vllm.train.model import DsaModel

    packed = DsaModel(model.size)
    packed.load_state_dict(trained.unpack(trained.pack(model.state_dict())))
    return {
        f"{name} {mode}": perplexity(candidate, tokens, length, windows, mode)
        for name, candidate in (("float32", model), ("int8", packed.to(next(model.parameters()).device)))
        for mode in (DENSE, SPARSE)
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m misa_vllm.train.export", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of misa_vllm.train.corpus")
    parser.add_argument("--packed", type=Path, help="write the int8 form here")
    parser.add_argument("--figures", type=Path, help="of misa_vllm.train.evaluate, for the card")
    parser.add_argument("--model", type=Path, help="write a Hugging Face folder here")
    parser.add_argument("--compare", action="store_true", help="print perplexities of float32 and int8")
    parser.add_argument("--length", type=int, default=2048, help="tokens per window of --compare")
    parser.add_argument("--windows", type=int, default=16, help="windows of --compare")
    options = parser.parse_args(arguments)
    try:
        if options.figures and not options.packed:
            raise ValueError("--figures belong to a card beside the packed model: give --packed as well")
        if not (options.packed or options.model or options.compare):
            raise ValueError("nothing to do: give --packed, --model or --compare")
        model, page = checkpoint.load(options.checkpoint)
        tokenizer = options.data / "tokenizer.json"
        if options.figures:
            figures = json.loads(options.figures.read_text(encoding="utf-8"))
            sources = json.loads((options.data / "corpus.json").read_text(encoding="utf-8"))
        if options.packed:
            written = trained.write_packed(options.packed, model.state_dict(), model.size.as_dict(), tokenizer)
            if options.figures:
                parameters = sum(p.numel() for p in model.parameters())
                text = write_card(model.size.as_dict(), parameters, written, figures, sources)
                (options.packed / CARD).write_text(text, encoding="utf-8")
            print(f"{options.packed}: {written / 1e6:.2f} MB after {page['tokens'] / 1e6:.0f} M tokens of training")
        if options.model:
            written = trained.write_model(options.model, model.state_dict(), model.size.as_dict(), tokenizer)
            print(f"{options.model}: {written['parameters'] / 1e6:.1f} M parameters, {written['bytes'] / 1e6:.1f} MB")
        if options.compare:
            from misa_vllm.train.tasks import Corpus

            tokens = Corpus.read(options.data, "heldout").tokens
            for name, value in compare(model, tokens, options.length, options.windows).items():
                print(f"{name:16} {value:.4f}")
    except (ValueError, OSError, KeyError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
