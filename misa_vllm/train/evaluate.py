"""What a model in training can do: needles by length and depth, and perplexity, dense and with DSA's selection.

    python -m misa_vllm.train.evaluate CHECKPOINT --data .cache/corpus --out evaluation.json --seconds 240

measures what would be shipped, the checkpoint rounded to int8 as `misa_vllm.models.trained` packs it, and writes the
figures that the model's card shows. Needles come in rounds: one per depth and length first, so that no length is left
out, then more of them, the more the shorter the prompts, until the time is up. What is known so far is always written.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from misa_vllm import reference
from misa_vllm.models import trained
from misa_vllm.train import checkpoint, kernels
from misa_vllm.train.model import DENSE, SPARSE, DsaModel, rope_tables
from misa_vllm.train.size import ModelSize
from misa_vllm.train.tasks import Corpus, needle_prompt

DEPTHS = tuple(i / 10 for i in range(11))
TOKENS_AT_ONCE = 65536
WHOLE = 64  # prompts are filled up to multiples of this: few shapes for the kernels, and rows that they like
LENGTHS = tuple(2**i for i in range(10, 18))
PERPLEXITY_LENGTHS = (1024, 4096, 32768)
ROUND_TOKENS = 32768  # of one depth's prompts in a round
KEPT_LENGTHS, KEPT_QUERIES = (8192, 32768, 131072), 64
KEPT_HEADS, KEPT_BLOCK = 8, 1024  # the defaults of misa_vllm.config
TRAINING_FIGURES = ("steps", "tokens", "stage_steps", "progress", "concentrate")  # of a checkpoint's page


def autocast(device: torch.device):
    """bf16 products on GPUs; elsewhere everything is float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def needle_accuracy(
    model: DsaModel, corpus: Corpus, length: int, mode: str, seeds: int, depths=DEPTHS, seed: str = "eval"
) -> dict[float, float]:
    """Share of needles whose whole code is the likeliest continuation, by depth.

    The answer is given to the model token by token, which asks for the same as greedy decoding: the first wrong
    token is a wrong answer either way.
    """
    device = next(model.parameters()).device
    cases = [(depth, needle_prompt(corpus, length, depth, f"{seed}/{length}/{depth}/{i}"))
             for depth in depths for i in range(seeds)]  # fmt: skip
    found: dict[float, list[bool]] = {depth: [] for depth in depths}
    at_once = max(1, TOKENS_AT_ONCE // length)
    for start in range(0, len(cases), at_once):
        part = cases[start : start + at_once]
        answers = torch.tensor([answer for _, (_, answer) in part], device=device)
        end = length + answers.shape[1] - 1
        filling = [0] * (-end % WHOLE)  # behind the answer, so without influence on it
        tokens = torch.tensor([prompt + answer[:-1] + filling for _, (prompt, answer) in part], device=device)
        with autocast(device):
            hidden, _ = model(tokens, mode)
            guessed = model.logits(hidden[:, length - 1 : end]).argmax(-1)
        for (depth, _), right in zip(part, (guessed == answers).all(-1).tolist(), strict=True):
            found[depth].append(right)
    return {depth: sum(right) / len(right) for depth, right in found.items()}


@torch.no_grad()
def perplexity(model: DsaModel, tokens: np.ndarray, length: int, windows: int, mode: str = DENSE) -> float:
    """Perplexity per token of `windows` windows of `length` tokens, spread evenly over `tokens`."""
    device = next(model.parameters()).device
    windows = max(1, min(windows, (len(tokens) - 1) // length))
    starts = np.linspace(0, len(tokens) - 1 - length, windows).astype(int)
    total, at_once = 0.0, max(1, TOKENS_AT_ONCE // length)
    for i in range(0, windows, at_once):
        rows = np.stack([tokens[start : start + length + 1] for start in starts[i : i + at_once]]).astype(np.int64)
        batch = torch.from_numpy(rows).to(device)
        with autocast(device):
            hidden, _ = model(batch[:, :-1], mode)
            losses, _ = model.token_losses(hidden, batch[:, 1:])
        total += losses.double().sum().item()
    return math.exp(total / (windows * length))


@torch.no_grad()
def kept_by_misa(
    model: DsaModel, tokens: np.ndarray, lengths=None, heads: int = KEPT_HEADS, pool_block: int = KEPT_BLOCK, log=print
) -> dict[str, list[float]]:
    """`kept/LENGTH`: mean share of exact DSA's tokens that `heads` routed heads select too, layer by layer.

    Of `KEPT_QUERIES` queries in the second half of the first window of that length in `tokens`; `negative/LENGTH` is
    the share of negative gates there. Lengths that model or text do not reach, and those whose second half sees no
    more than the top-k or no whole pool block, are left out. The layers' inputs are those of dense attention, which
    costs a tenth of DSA's in training code and hardly changes them.
    """
    device, topk, found = next(model.parameters()).device, model.size.topk, {}
    layers = [layer.self_attn for layer in model.model["layers"]]
    for length in KEPT_LENGTHS if lengths is None else lengths:
        if length > min(model.size.max_position, len(tokens)) or length // 2 < max(topk + 1, pool_block):
            continue
        window = torch.from_numpy(tokens[:length].astype(np.int64)).to(device)
        rows = torch.linspace(length // 2, length - 1, KEPT_QUERIES, device=device).long()
        rope = rope_tables(model.size, torch.arange(length, device=device))
        shares, negative = [], []

        def look(attention, arguments, rows=rows, rope=rope, shares=shares, negative=negative):
            x = arguments[0]  # [1, length, hidden]
            keys = attention.indexer.keys(x, rope)[0].float()
            latent = attention.q_a_layernorm(attention.q_a_proj(x[0, rows]))
            q, gates = attention.indexer.queries(x[0, rows], latent, [table[rows] for table in rope])
            # not rounded by autocast: to bf16's eight bits thousands of tokens would tie
            with torch.autocast(device.type, enabled=False):
                best = (
                    reference.dsa(q, gates, keys, rows + 1, topk),
                    reference.misa(q, gates, keys, rows + 1, topk, min(heads, q.shape[1]), pool_block),
                )
            blank = torch.zeros(len(rows), len(keys), dtype=torch.bool, device=device)
            chosen = [blank.scatter(1, tokens.long(), True) for tokens in best]
            shares.append((chosen[0] & chosen[1]).sum() / (topk * len(rows)))
            negative.append((gates < 0).float().mean())

        hooks = [attention.register_forward_pre_hook(look) for attention in layers]
        try:
            with autocast(device):
                model(window.unsqueeze(0), DENSE)
        finally:
            for hook in hooks:
                hook.remove()
        for name, values in (("kept", shares), ("negative", negative)):
            found[f"{name}/{length}"] = [round(value, 4) for value in torch.stack(values).tolist()]
        shown = ("  ".join(f"{value:.1%}" for value in found[f"{name}/{length}"]) for name in ("kept", "negative"))
        log("   kept by {} heads {:6}: {}   negative gates: {}".format(heads, length, *shown))
    return found


# ---------------------------------------------------------------- the whole picture


def measure(
    model: DsaModel, held_out: Corpus, lengths: tuple[int, ...], seconds: float, tokens: int, log=print
) -> Iterator[dict]:
    """Perplexities of `tokens` tokens, then rounds of needles until the time is up; counts are [right, asked].

    Yields all that is known whenever there is more.
    """
    began = time.monotonic()
    found: dict = {"perplexity": {DENSE: {}, SPARSE: {}}, "needles": {SPARSE: {}, DENSE: {}}}
    for length in PERPLEXITY_LENGTHS:
        if length > min(model.size.max_position, len(held_out.tokens) - 1):
            continue
        for mode in (DENSE, SPARSE):
            value = perplexity(model, held_out.tokens, length, max(1, tokens // length), mode)
            found["perplexity"][mode][str(length)] = round(value, 4)
            log(f"perplexity {mode:6} {length:6}: {value:.3f}")
            yield found
    rounds, took = 0, {}
    work = [(mode, length) for length in lengths for mode in (SPARSE, DENSE)]
    while work:
        for mode, length in list(work):
            started = time.monotonic()
            each = max(1, ROUND_TOKENS // length) if rounds else 1
            # what would end late is not begun, but for the first round
            if rounds and started + each * took[mode, length] > began + seconds:
                work.remove((mode, length))
                continue
            shares = needle_accuracy(model, held_out, length, mode, each, seed=f"card/{rounds}")
            cell = found["needles"][mode].setdefault(str(length), {})
            for depth, share in shares.items():
                right, asked = cell.get(str(depth), (0, 0))
                cell[str(depth)] = [right + round(share * each), asked + each]
            spent = time.monotonic() - started
            took[mode, length] = spent / each
            log(f"needles {mode:6} {length:6}: {sum(shares.values()) / len(shares):.3f}  "
                + " ".join(f"{share:.2f}" for share in shares.values())
                + f"  {spent:.1f} s")  # fmt: skip
            yield found
        rounds += 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m misa_vllm.train.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of misa_vllm.train.corpus")
    parser.add_argument("--out", type=Path, required=True, help="write the figures here, a JSON file")
    parser.add_argument("--lengths", type=lambda s: tuple(map(int, s.split(","))), default=LENGTHS, metavar="N,N")
    parser.add_argument("--seconds", type=float, default=240.0, help="for all of it")
    parser.add_argument("--tokens", type=int, default=262144, help="of held-out text for each perplexity")
    parser.add_argument("--ngram", type=Path, help="what misa_vllm.train.ngram printed, to stand beside the model's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    try:
        device = torch.device(options.device)
        model, page = checkpoint.load(options.checkpoint)
        shipped = DsaModel(ModelSize(**page["size"]))
        shipped.load_state_dict(trained.unpack(trained.pack(model.state_dict())))
        size = shipped.size
        sizes = size.heads, size.index_heads, size.head_dim, size.index_head_dim, size.topk
        for line in kernels.choose(device, *sizes):
            print(line, flush=True)
        lengths = tuple(length for length in options.lengths if length + 8 <= size.max_position)
        lengths += (size.max_position - WHOLE,) if len(lengths) < len(options.lengths) else ()
        held_out = Corpus.read(options.data, "heldout")
        about = {
            "ngram": json.loads(options.ngram.read_text(encoding="utf-8")) if options.ngram else None,
            "training": {name: page[name] for name in TRAINING_FIGURES if name in page},
            "machine": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
            "torch": torch.__version__,
        }
        shipped.to(device)
        about |= kept_by_misa(shipped, held_out.tokens, log=lambda line: print(line, flush=True))
        for found in measure(
            shipped, held_out, lengths, options.seconds, options.tokens, log=lambda line: print(line, flush=True)
        ):
            options.out.write_text(json.dumps(found | about, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
