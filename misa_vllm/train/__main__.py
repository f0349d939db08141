"""`python -m misa_vllm.train`: trains the small DSA model on the data that `misa_vllm.train.corpus` made."""

import argparse
import sys
from pathlib import Path

from misa_vllm.train.plan import PLANS, Plan, with_vocabulary


def main(arguments: list[str] | None = None) -> int:
    # not at the top: processes that make batches import this file too
    import torch

    from misa_vllm.train.bpe import Encoder
    from misa_vllm.train.run import Options, train

    parser = argparse.ArgumentParser(prog="python -m misa_vllm.train", description=__doc__.split(": ")[1])
    parser.add_argument("--data", type=Path, required=True, help="folder of misa_vllm.train.corpus, unpacked")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint and curves go here")
    parser.add_argument("--plan", choices=tuple(PLANS), default="full")
    parser.add_argument("--minutes", type=float, default=10.0, help="wall-clock time of this run")
    text = "part of the whole training done when this run ends, 0 to 1, or the name of its last stage (default: 1)"
    parser.add_argument("--until", default="1", metavar="PART", help=text)
    parser.add_argument("--resume", type=Path, help="folder of a checkpoint, or of a packed model, to go on from")
    text = "resume with untrained indexers, at the beginning of the plan; --plan indexer trains nothing else"
    parser.add_argument("--new-indexers", action="store_true", help=text)
    text = "weight in the indexer's loss of the logarithm of how many heads count for a query (default: 0)"
    parser.add_argument("--concentrate", type=float, default=0.0, metavar="WEIGHT", help=text)
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches; 0: none, this one does")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", default="misa")
    parser.add_argument("--compile", action="store_true", help="torch.compile the MLPs")
    text = "no training: so many steps of every stage, and whether the plan fits into --minutes of this machine's time"
    parser.add_argument("--smoke", type=int, default=0, metavar="STEPS", help=text)
    parser.add_argument("--eval-lengths", type=lambda s: tuple(map(int, s.split(","))), default=(), metavar="N,N")
    parser.add_argument("--eval-needles", type=int, default=2, help="needles per depth and length")
    parser.add_argument("--log-seconds", type=float, default=3.0)
    parser.add_argument("--finish-seconds", type=float, default=25.0, help="kept for the last evaluation")
    options = vars(parser.parse_args(arguments))
    plan = PLANS[options.pop("plan")]()
    try:
        options["until"] = _progress(plan, options["until"])
        if options["minutes"] * 60 <= options["finish_seconds"] and not options["smoke"]:
            raise ValueError(f"--minutes is {options['minutes']}: choose more than --finish-seconds leaves")
        if not options["concentrate"] >= 0:
            raise ValueError(f"--concentrate is {options['concentrate']}: choose 0 or more")
        vocabulary = len(Encoder(options["data"] / "tokenizer.json"))
        page = train(with_vocabulary(plan, vocabulary), Options(**options), log=lambda line: print(line, flush=True))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0 if page.get("fits", True) else 1


def _progress(plan: Plan, until: str) -> float:
    try:
        progress = float(until)
    except ValueError:
        return plan.progress_behind(until)
    if not 0 < progress <= 1:
        raise ValueError(f"--until is {until}: choose a number above 0 and at most 1, or a stage of the plan")
    return progress


if __name__ == "__main__":
    sys.exit(main())
