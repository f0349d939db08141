"""Draws the figures of `misa-eval recall`. Needs matplotlib."""

from pathlib import Path

from matplotlib.figure import Figure  # without pyplot: no display, no global state

from misa_vllm.bench.report import replacing
from misa_vllm.eval.statistics import SERVED

STYLES = {"misa": "-", "hierarchical": "--", "hisa": ":"}
"""Policy -> line style."""
MOST_LINES = 14
"""More lines cannot be told apart: the served statistic, then the narrowest and the widest block, stand for all."""


def plot_recall(result: dict, file: Path) -> None:
    """Write four panels: recall over layers, over context lengths, over positions, and the use of heads.

    Layers, positions and heads are those of the longest context. The format is the file's suffix.
    """
    figure = Figure(figsize=(13, 9), layout="constrained")
    by_layer, by_context, by_position, heads = figure.subplots(2, 2).flat
    longest = result["contexts"][-1]
    for row, colour in _shown(longest["variants"]):
        line = {"color": colour, "linestyle": STYLES[row["policy"]], "marker": "o", "markersize": 3}
        layers = [one["layer"] for one in row["per_layer"]]
        by_layer.plot(layers, [one["recall_mean"] for one in row["per_layer"]], label=row["name"], **line)
        middles = [(one["from"] + one["to"]) / 2 for one in row["by_position"]]
        by_position.plot(middles, [one["recall_mean"] for one in row["by_position"]], **line)
        over_context = [
            (part["context"], same["recall_mean"])
            for part in result["contexts"]
            for same in part["variants"]
            if _setting(same) == _setting(row)
        ]
        by_context.plot(*zip(*over_context), **line)
    figure.legend(loc="outside lower center", fontsize="x-small", ncols=6)
    _label(by_layer, f"layer, context {longest['context']}", "recall of exact DSA's tokens")
    by_layer.xaxis.get_major_locator().set_params(integer=True)
    _label(by_context, "context, tokens", "recall of exact DSA's tokens")
    by_context.set_xscale("log", base=2)
    by_context.set_xticks([part["context"] for part in result["contexts"]])
    by_context.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}K")
    _label(by_position, f"position of the query, context {longest['context']}", "recall of exact DSA's tokens")
    _draw_heads(heads, longest)
    environment = result["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("vllm", "torch", "misa_vllm", "commit"))
    figure.suptitle(
        f"{result['architecture']}, top-{result['topk']}, seed {result['seed']}; {environment['hardware']}: {versions}",
        fontsize="small",
    )
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=150)


def _setting(row: dict) -> tuple:
    """What names a variant at every context length; HISA's candidates change with it."""
    return tuple(row[name] for name in ("policy", "active_heads", "pool_block", "statistic"))


def _shown(variants: list[dict]) -> list[tuple[dict, str]]:
    """The variants that are drawn, each with a colour: those of one setting have the same in all policies."""
    blocks = sorted({row["pool_block"] for row in variants if row["pool_block"] is not None})
    kept = variants
    if len(kept) > MOST_LINES:
        kept = [row for row in kept if row["statistic"] in (None, SERVED)] or kept
    if len(kept) > MOST_LINES:
        kept = [row for row in kept if row["pool_block"] in (None, blocks[0], blocks[-1])]
    settings = dict.fromkeys(_setting(row)[1:] for row in kept)
    colours = {setting: f"C{number % 10}" for number, setting in enumerate(settings)}
    return [(row, colours[_setting(row)[1:]]) for row in kept]


def _label(axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def _draw_heads(axes, part: dict) -> None:
    """How often each head is routed to, the most used first, one line per layer; of a middle h, the widest block."""
    served = [usage for usage in part["head_usage"] if usage["statistic"] == SERVED] or part["head_usage"]
    if not served:
        axes.set_axis_off()
        return
    widest = max(usage["pool_block"] or 0 for usage in served)
    of_widest = sorted(
        (usage for usage in served if (usage["pool_block"] or 0) == widest), key=lambda usage: usage["active_heads"]
    )
    usage = of_widest[(len(of_widest) - 1) // 2]
    for layer in usage["layers"]:
        share = sorted(layer["share"], reverse=True)
        axes.plot(range(1, len(share) + 1), share, label=f"layer {layer['layer']}")
    even = usage["active_heads"] / len(usage["layers"][0]["share"])
    axes.axhline(even, color="grey", linewidth=0.8, label="all heads alike")
    _label(axes, f"head by rank, h={usage['active_heads']} B={usage['pool_block']}", "share of queries routed to it")
    if len(usage["layers"]) <= MOST_LINES:
        axes.legend(fontsize="xx-small", ncols=2)
