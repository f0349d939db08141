"""Draws the curves of training.

python -m misa_vllm.train.plot OUT/curves.jsonl curves.png
"""

import argparse
import json
import sys
from pathlib import Path

from misa_vllm.train.tasks import TASKS


def read(path: Path) -> tuple[list[dict], list[dict]]:
    """The records of steps and of evaluations.

    Raises:
        ValueError: the file holds no curves; one line.
    """
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} holds no curves ({error}): name the curves.jsonl of a training run") from error
    steps = [record for record in records if "stage" in record]
    if not steps:
        raise ValueError(f"{path} holds no steps: name the curves.jsonl of a training run")
    return steps, [record for record in records if "evaluation" in record]


def draw(steps: list[dict], evaluations: list[dict], target: Path) -> None:
    """Losses, right answers, the indexer's loss, and needles by evaluation, in one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((losses, right), (indexer, needles)) = pyplot.subplots(2, 2, figsize=(13, 8), constrained_layout=True)
    for task in TASKS:
        points = [(record["progress"], record[task], record[f"{task}_right"]) for record in steps if task in record]
        if points:
            where, loss, share = zip(*points, strict=True)
            losses.plot(where, loss, label=task, linewidth=1)
            right.plot(where, share, label=task, linewidth=1)
    learning = [(record["progress"], record["kl"]) for record in steps if record["kl"]]
    if learning:
        indexer.plot(*zip(*learning, strict=True), linewidth=1)
        indexer.set_yscale("log")
    series: dict[str, list] = {}
    for record in evaluations:
        for name, depths in record.items():
            if name.startswith("needle/"):
                series.setdefault(name[7:], []).append((record["progress"], sum(depths.values()) / len(depths)))
    for name, points in series.items():
        needles.plot(*zip(*points, strict=True), marker="o", linewidth=1, label=name)
    changes = [a["progress"] for a, b in zip(steps[1:], steps, strict=False) if a["stage"] != b["stage"]]
    titles = ("loss per token, nats", "likeliest token is right", "indexer's KL divergence", "needles found")
    for axes, title in zip((losses, right, indexer, needles), titles, strict=True):
        axes.set_title(title)
        axes.set_xlabel("progress")
        for change in changes:
            axes.axvline(change, color="0.85", linewidth=0.8, zorder=0)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m misa_vllm.train.plot", description="Draws the curves of training.")
    parser.add_argument("curves", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args(arguments)
    try:
        draw(*read(options.curves), options.target)
    except (ValueError, OSError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
