"""How much of what exact DSA selects MISA selects, layer by layer, on a checkpoint and texts of yours.

The model runs in vLLM under policy dsa, so that every layer's hidden states are those of exact DSA. For a sample of
queries, every layer then selects with all variants from the same index queries, gates and keys: MISA, hierarchical
MISA and HISA. Recall is the share of exact DSA's tokens among the selected; attention mass is what full attention
(over all earlier tokens, mean of the heads) gives to the selected. Queries that see at most index_topk tokens
select them all under any policy and are not sampled. A context of N tokens is N - 1 tokens of text, its beginning,
and the token that the model adds.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from misa_vllm.bench.report import aligned_table, at_least, environment, one_line, plain, require_folder, write_text
from misa_vllm.config import resolve_settings
from misa_vllm.eval.engines import add_engine_arguments, engine_arguments
from misa_vllm.eval.probe import Variant
from misa_vllm.eval.report import EvalError, can_draw, described
from misa_vllm.eval.statistics import SERVED, STATISTICS
from misa_vllm.policies import POLICIES
from misa_vllm.policies.hisa import BLOCK as HISA_BLOCK

COMPARED = tuple(name for name in POLICIES if name != "dsa")
HISA_BLOCKS = 64
"""m of the paper's HISA."""
POSITION_BUCKETS = 8
PERCENTILE = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    whole = at_least(1)
    parser.add_argument("model", metavar="MODEL", help="folder or name of a DSA checkpoint, as for vllm serve")
    text = "UTF-8 texts, each a prompt of its own"
    parser.add_argument("--text", nargs="+", type=Path, required=True, metavar="FILE", help=text)
    parser.add_argument("--policy", type=words(COMPARED), default=list(COMPARED), help=f"default {','.join(COMPARED)}")
    parser.add_argument("--heads", type=numbers, default=[4, 8, 16], help="h of MISA; default 4,8,16")
    parser.add_argument(
        "--pool-block", type=numbers, default=[64, 128, 256, 1024], help="B of MISA, tokens; default 64,128,256,1024"
    )
    parser.add_argument("--candidates", type=whole, default=8192, help="C of hierarchical MISA; default 8192")
    parser.add_argument(
        "--statistics", type=words(tuple(STATISTICS)), default=[SERVED],
        help=f"what the router reads of the keys: {','.join(STATISTICS)} (those but {SERVED} in fp32); "
        f"default {SERVED}",
    )  # fmt: skip
    parser.add_argument("--context", type=numbers, default=[8192], help="context lengths, tokens; default 8192")
    parser.add_argument("--queries", type=whole, default=256, help="queries per text and context; default 256")
    parser.add_argument("--seed", type=int, default=0, help="of the sampled positions; default 0")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write recall.json and recall.png there")
    # the comparison needs memory of its own
    add_engine_arguments(parser, left_out=("max_model_len",), gpu_memory_utilization=0.8)


def numbers(text: str) -> list[int]:
    """An argparse type: positive whole numbers separated by commas, in ascending order."""
    values = [int(word) for word in text.split(",")]
    if min(values) < 1:
        raise ValueError
    return sorted(set(values))


def words(known: Sequence[str]):
    """An argparse type: some of the `known` words separated by commas, in their order."""

    def choose(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [word for word in chosen if word not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown: choose from {','.join(known)}")
        return [word for word in known if word in chosen]

    return choose


def run(args: argparse.Namespace) -> int:
    require_folder(args.output)
    texts = [read_text(file) for file in args.text]
    started = time.monotonic()
    checkpoint = open_checkpoint(args)
    topk, index_heads = checkpoint.hf_config.index_topk, checkpoint.hf_config.index_n_heads
    prompts = [checkpoint.encode(text) for text in texts]
    require_lengths(args, prompts, topk, checkpoint.max_model_len)
    llm = start_engine(args)
    progress = Progress(args.context, len(prompts))
    contexts = []
    for context in args.context:
        positions = sample_positions(context, topk, args.queries, args.seed)
        variants = variants_of(args, positions, topk, index_heads)
        beginnings = [prompt[: context - 1] for prompt in prompts]
        contexts.append(measure(llm, beginnings, positions, variants, topk, index_heads, context, progress))
    result = {
        "environment": environment(),
        "seconds": round(time.monotonic() - started, 1),
        "model": args.model,
        "architecture": checkpoint.hf_config.architectures[0],
        "index_heads": index_heads,
        "topk": topk,
        "seed": args.seed,
        "arguments": plain({**vars(args), "text": [str(file) for file in args.text]}),
        "texts": [
            {**described(file), "tokens": len(prompt)} for file, prompt in zip(args.text, prompts, strict=True)
        ],
        "contexts": contexts,
    }
    print(as_text(result))
    if args.output is not None:
        write(result, args.output)
    return 0


# ---------------------------------------------------------------- input


def read_text(file: Path) -> str:
    """The file's text. Raises EvalError if there is none."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise EvalError(f"--text {file} is not UTF-8 text: convert it first") from None
    except OSError as error:
        raise EvalError(f"--text {file} cannot be read ({error.strerror}): name a text file") from None
    if not text.strip():
        raise EvalError(f"--text {file} is empty: name a file with text")
    return text


def open_checkpoint(args: argparse.Namespace):
    """The model's config and tokenizer; raises EvalError or MISAConfigError on what cannot be measured."""
    from misa_vllm.seam import version_problem
    from misa_vllm.seam.checkpoint import read_checkpoint

    if problem := version_problem():
        raise EvalError(problem)
    try:
        checkpoint = read_checkpoint(args.model, **engine_arguments(args))
    except Exception as error:  # vLLM, transformers and pydantic raise of many kinds
        raise EvalError(f"{args.model} cannot be opened: {reason(error)}") from None
    config = checkpoint.hf_config
    if not getattr(config, "index_n_heads", None) or not getattr(config, "index_topk", None):
        raise EvalError(
            f"{args.model} has no DSA indexer (index_n_heads, index_topk in config.json): name a DeepSeek-V3.2 or "
            "GLM-5 checkpoint"
        )
    for options in (
        {"active_heads": max(args.heads)},
        *({"active_heads": 1, "pool_block": block} for block in args.pool_block),
        {"active_heads": 1, "candidates": args.candidates},
    ):
        resolve_settings(options, config)
    return checkpoint


def reason(error: Exception) -> str:
    """What an error of vLLM says, in one line."""
    details = getattr(error, "errors", None)  # pydantic's list of complaints
    if callable(details) and details():
        return details()[0]["msg"].removeprefix("Value error, ").splitlines()[0]
    return one_line(error)


def require_lengths(args: argparse.Namespace, prompts: Iterable[list[int]], topk: int, limit: int) -> None:
    """Raise EvalError unless every context is longer than top-k, no longer than the model's limit and the texts."""
    longest, shortest = args.context[-1], args.context[0]
    if longest > limit:
        raise EvalError(f"--context {longest} is beyond the model's limit: choose at most {limit}")
    if shortest < topk + 2:
        raise EvalError(
            f"--context {shortest} leaves no query that sees more than the {topk} tokens it selects: "
            f"choose at least {topk + 2}"
        )
    for file, prompt in zip(args.text, prompts):
        if len(prompt) < longest - 1:
            raise EvalError(
                f"--text {file} has {len(prompt)} tokens, --context {longest} takes {longest - 1}: "
                "name a longer text or a shorter context"
            )


def sample_positions(context: int, topk: int, count: int, seed: int) -> list[int]:
    """`count` positions, ascending and distinct, one drawn from each of as many equal parts of topk .. context - 2."""
    first, end = topk, context - 1
    count = min(count, end - first)
    rng = random.Random(f"{seed}/{context}")
    edges = [first + (end - first) * i // count for i in range(count + 1)]
    return [rng.randrange(low, high) for low, high in zip(edges, edges[1:])]


def variants_of(args: argparse.Namespace, positions: Sequence[int], topk: int, index_heads: int) -> list[Variant]:
    """What is compared for queries at these positions."""
    found = []
    for policy in args.policy:
        if policy == "hisa":
            found.append(Variant("hisa", candidates=max(HISA_BLOCK * HISA_BLOCKS, -(-topk // HISA_BLOCK) * HISA_BLOCK)))
            widest = args.pool_block[-1]
            ours = [Variant("misa", h, widest, None, SERVED) for h in args.heads]
            found += [equal_cost_hisa(one, np.asarray(positions), topk, index_heads) for one in ours]
            continue
        candidates = max(args.candidates, topk) if policy == "hierarchical" else None
        for statistic in args.statistics:
            for block in [None] if STATISTICS[statistic].vectors is None else args.pool_block:
                found += [Variant(policy, h, block, candidates, statistic) for h in args.heads]
    return found


def equal_cost_hisa(misa: Variant, positions: np.ndarray, topk: int, index_heads: int) -> Variant:
    """HISA with the most blocks m for which its queries cost no more than those of `misa`.

    With v visible keys a query of MISA costs h v + H v / B products, one of HISA H v / 128 + H 128 m (H v, exact DSA,
    where m blocks hold all), 128 being HISA's block; both are summed over the sampled queries. HISA needs enough
    blocks for k tokens and never fewer than two: `cost` shows where that is more than MISA's.
    """
    limit = cost(misa, positions, topk, index_heads)
    fewest = max(2, -(-topk // HISA_BLOCK))

    def with_blocks(m: int) -> Variant:
        return Variant("hisa", active_heads=misa.active_heads, candidates=m * HISA_BLOCK)

    most = int(positions[-1]) // HISA_BLOCK + 1
    fitting = (m for m in range(most, fewest, -1) if cost(with_blocks(m), positions, topk, index_heads) <= limit)
    return with_blocks(next(fitting, fewest))


def cost(variant: Variant, positions: np.ndarray, topk: int, index_heads: int) -> float:
    """Products q . k that the variant computes for these queries, as a share of DSA's."""
    visible = np.asarray(positions) + 1.0
    # below these lengths the policies are exact DSA
    exact = (visible <= max(topk, variant.candidates or 0)) | (visible < (variant.pool_block or 0))
    vectors = STATISTICS[variant.statistic].vectors if variant.statistic else 0
    if vectors is None:
        ours = visible
    elif variant.policy == "hisa":
        ours = visible / HISA_BLOCK + variant.candidates
    else:
        routing = vectors * visible / variant.pool_block
        ours = variant.active_heads / index_heads * visible + routing + (variant.candidates or 0)
    return float(np.where(exact, visible, ours).sum() / visible.sum())


# ---------------------------------------------------------------- measurement


def start_engine(args: argparse.Namespace):
    """The model in vLLM under policy dsa, one prompt at a time, with the probe in its workers."""
    from vllm import LLM
    from vllm.platforms import current_platform

    options = {
        "max_model_len": args.context[-1],
        "max_num_seqs": 1,
        "enforce_eager": True,
        # every query is to be computed, whatever an earlier prompt left in the cache
        "enable_prefix_caching": False,
        **engine_arguments(args),
    }
    if current_platform.is_cuda():
        # no attention but the one that the probe can see
        options["attention_config"] = {**options.get("attention_config", {}), "sparse_mla_force_mqa": True}
    try:
        return LLM(
            args.model,
            attention_backend="misa",
            additional_config={"misa": {"policy": "dsa"}},
            worker_extension_cls="misa_vllm.eval.probe.RecallProbe",
            **options,
        )
    except Exception as error:  # of any kind, and after its own long log
        raise EvalError(f"the engine does not start: {reason(error)}") from None


@dataclass
class Progress:
    """One line on a terminal, rewritten."""

    contexts: list[int]
    texts: int

    def show(self, context: int, text: int) -> None:
        if sys.stderr.isatty():
            number, total = self.contexts.index(context) * self.texts + text + 1, len(self.contexts) * self.texts
            end = "\n" if number == total else ""
            print(f"\rprompt {number} of {total}, {context} tokens ...", end=end, file=sys.stderr, flush=True)


def measure(
    llm,
    prompts: list[list[int]],
    positions: list[int],
    variants: list[Variant],
    topk: int,
    index_heads: int,
    context: int,
    progress: Progress | None = None,
) -> dict:
    """Run the prompts and summarise one context length; the figures are those of the JSON file.

    Args:
        prompts: token ids, each longer than the last of `positions`.
        positions: of the sampled queries, ascending.
    """
    from vllm import SamplingParams

    one_token = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    layers: dict[int, LayerFigures] = {}
    seconds = []
    for number, prompt in enumerate(prompts):
        if progress is not None:
            progress.show(context, number)
        started = time.monotonic()
        llm.collective_rpc("misa_recall_start", args=(positions, [asdict(variant) for variant in variants]))
        llm.generate([{"prompt_token_ids": prompt}], one_token, use_tqdm=False)
        workers = llm.collective_rpc("misa_recall_finish")
        seconds.append(round(time.monotonic() - started, 3))
        for layer, figures in merged(workers).items():
            layers[layer] = layers[layer].followed_by(figures) if layer in layers else figures
    return {
        "context": context,
        "queries": len(positions) * len(prompts),
        "seconds": seconds,
        **summary(layers, np.tile(positions, len(prompts)), variants, topk, index_heads, context),
    }


@dataclass
class LayerFigures:
    """One layer's figures: arrays over [variants, queries], or [queries]."""

    recall: np.ndarray
    engine_recall: np.ndarray
    mass: np.ndarray | None
    """Mean over the attention heads."""
    dsa_mass: np.ndarray | None
    routed: dict[tuple, tuple[int, np.ndarray]]
    """`Variant.routing` -> (queries routed, times each head was chosen [H])."""

    def followed_by(self, other: "LayerFigures") -> "LayerFigures":
        """The same with the queries of another prompt behind."""

        def behind(mine, others):
            return None if mine is None or others is None else np.concatenate([mine, others], axis=-1)

        routed = {
            key: (self.routed[key][0] + queries, self.routed[key][1] + counts)
            for key, (queries, counts) in other.routed.items()
        }
        return LayerFigures(
            behind(self.recall, other.recall),
            behind(self.engine_recall, other.engine_recall),
            behind(self.mass, other.mass),
            behind(self.dsa_mass, other.dsa_mass),
            routed,
        )


def merged(workers: list[list[dict]]) -> dict[int, LayerFigures]:
    """Layer -> figures, from what the workers returned.

    Indexers are replicated over tensor-parallel ranks, so all ranks that hold a layer report the same selections; its
    attention heads are divided among them, so their masses add up.
    """
    by_layer: dict[int, list[dict]] = {}
    for worker in workers:
        for report in worker:
            by_layer.setdefault(report["layer"], []).append(report)
    figures = {}
    for layer, reports in sorted(by_layer.items()):
        first, heads = reports[0], sum(report["heads"] for report in reports)
        readable = all(report["mass"] is not None for report in reports)

        def mean_of_heads(name: str) -> np.ndarray | None:
            return sum(np.asarray(report[name]) for report in reports) / heads if readable else None

        figures[layer] = LayerFigures(
            np.asarray(first["recall"]),
            np.asarray(first["engine_recall"]),
            mean_of_heads("mass"),
            mean_of_heads("dsa_mass"),
            {tuple(key): (rows, np.asarray(counts)) for key, rows, counts in first["routed"]},
        )
    return figures


# ---------------------------------------------------------------- figures


def summary(
    layers: dict[int, LayerFigures],
    positions: np.ndarray,
    variants: list[Variant],
    topk: int,
    index_heads: int,
    context: int,
) -> dict:
    """The figures of one context length; mean, percentile and so on over layers and queries alike."""
    edges = [context * i // POSITION_BUCKETS for i in range(POSITION_BUCKETS + 1)]
    bucket = np.searchsorted(edges, positions, side="right") - 1
    everywhere = list(layers.values())
    dsa_mass = _mean_or_none([figures.dsa_mass for figures in everywhere])
    rows = []
    for i, variant in enumerate(variants):
        recall = np.stack([figures.recall[i] for figures in everywhere])
        mass = _mean_or_none([None if figures.mass is None else figures.mass[i] for figures in everywhere])
        per_layer = [
            {
                "layer": layer,
                **_recall_figures(figures.recall[i]),
                "mass": None if figures.mass is None else float(figures.mass[i].mean()),
                "dsa_mass": None if figures.mass is None else float(figures.dsa_mass.mean()),
            }
            for layer, figures in layers.items()
        ]
        worst = min(per_layer, key=lambda row: row["recall_mean"])
        rows.append(
            {
                **asdict(variant),
                "name": name_of(variant),
                "cost": cost(variant, positions, topk, index_heads),
                **_recall_figures(recall),
                "worst_layer": worst["layer"],
                "worst_layer_recall": worst["recall_mean"],
                "mass": mass,
                "mass_ratio": None if mass is None else mass / dsa_mass,
                "per_layer": per_layer,
                "by_position": [
                    {"from": edges[b], "to": edges[b + 1], "queries": int((bucket == b).sum()), **_recall_figures(part)}
                    for b in range(POSITION_BUCKETS)
                    if (part := recall[:, bucket == b]).size
                ],
            }
        )
    engine = np.stack([figures.engine_recall for figures in everywhere])
    return {
        "layers": list(layers),
        "dsa_mass": dsa_mass,
        "engine": _recall_figures(engine),
        "variants": rows,
        "head_usage": [
            {
                **dict(zip(("active_heads", "pool_block", "statistic"), routing, strict=True)),
                **head_usage(layers, routing),
            }
            for routing in everywhere[0].routed
        ],
    }


def _mean_or_none(parts: list[np.ndarray | None]) -> float | None:
    return None if any(part is None for part in parts) else float(np.mean(parts))


def _recall_figures(recall: np.ndarray) -> dict[str, float]:
    return {"recall_mean": float(recall.mean()), "recall_p5": float(np.percentile(recall, PERCENTILE))}


def head_usage(layers: dict[int, LayerFigures], routing: tuple) -> dict:
    """Share of the routed queries that each head scored for, and which heads never or always did, per layer."""
    per_layer = []
    for layer, figures in layers.items():
        queries, counts = figures.routed[routing]
        per_layer.append(
            {
                "layer": layer,
                "queries": queries,
                "share": (counts / max(1, queries)).round(4).tolist(),
                "never": np.flatnonzero(counts == 0).tolist() if queries else [],
                "always": np.flatnonzero(counts == queries).tolist() if queries else [],
            }
        )
    return {"layers": per_layer}


def name_of(variant: Variant) -> str:
    """The variant in one phrase."""
    if variant.policy == "hisa":
        at_cost = "" if variant.active_heads is None else f" (cost of h={variant.active_heads})"
        return f"hisa m={variant.candidates // HISA_BLOCK}{at_cost}"
    parts = [variant.policy, f"h={variant.active_heads}"]
    if variant.pool_block is not None:
        parts.append(f"B={variant.pool_block}")
    if variant.statistic != SERVED:
        parts.append(variant.statistic)
    return " ".join(parts)


# ---------------------------------------------------------------- output


def as_text(result: dict) -> str:
    """Each context length's table: one line per variant."""
    described = result["environment"]
    lines = [
        f"{result['architecture']}, {result['index_heads']} indexer heads, top-{result['topk']}; seed {result['seed']}",
        ", ".join(f"{name} {value}" for name, value in described.items() if value is not None and name != "hardware"),
        described["hardware"],
    ]
    header = ("variant", "cost", "recall", "p5", "worst layer", "mass", "of dsa's")
    for part in result["contexts"]:
        lines += [
            "",
            f"context {part['context']}: {part['queries']} queries, {len(part['layers'])} layers; the engine's own "
            f"selection: recall {percent(part['engine']['recall_mean'])}",
            aligned_table(
                header,
                [
                    ("dsa", percent(1), percent(1), percent(1), "", percent(part["dsa_mass"]), ""),
                    *(
                        (
                            row["name"],
                            percent(row["cost"]),
                            percent(row["recall_mean"]),
                            percent(row["recall_p5"]),
                            f"{percent(row['worst_layer_recall'])} ({row['worst_layer']})",
                            percent(row["mass"]),
                            percent(row["mass_ratio"]),
                        )
                        for row in part["variants"]
                    ),
                ],
                left=1,
            ),
        ]
        if part["dsa_mass"] is None:
            lines.append(
                "no attention mass: it is not computed from a quantised KV cache; choose --kv-cache-dtype bfloat16"
            )
    return "\n".join(lines)


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def write(result: dict, folder: Path) -> None:
    """Write recall.json, and recall.png where matplotlib is."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recall.json"
    write_text(file, json.dumps(result, indent=1) + "\n")
    print(f"wrote {file}", file=sys.stderr)
    if not can_draw("recall.png"):
        return
    from misa_vllm.eval.plot import plot_recall

    plot_recall(result, folder / "recall.png")
    print(f"wrote {folder / 'recall.png'}", file=sys.stderr)
