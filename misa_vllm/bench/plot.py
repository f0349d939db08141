"""Draws the figures of `misa-bench kernels`: speed-up over context, and growth of time. Needs matplotlib."""

from pathlib import Path

STAGES = {"whole": "-", "hierarchical": "--", "exact": ":"}
"""Stage -> line style."""


def plot(result: dict, file: Path) -> None:
    """Write one panel for each part of the result that has rows; the format is the file's suffix."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    panels = [(phase, _speedup) for phase in ("prefill", "decode") if curves(result["rows"], phase)]
    if result["growth"]:
        panels.append(("growth", _growth))
    figure = Figure(figsize=(6.4 * max(1, len(panels)), 4.8), layout="constrained")
    for axes, (name, draw) in zip(figure.subplots(1, len(panels), squeeze=False)[0] if panels else (), panels):
        draw(axes, result, name)
    environment = result["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("vllm", "torch", "misa_vllm", "commit"))
    figure.suptitle(f"{environment['hardware']}: {versions}", fontsize="small")
    figure.savefig(file, dpi=150)


def curves(rows: list[dict], phase: str) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(label, stage) -> (keys, speed-up over stock), ascending; decode shows next_n = 1 and policy misa."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        stage = row["stage"]
        if row["phase"] != phase or row["implementation"] == "stock" or stage not in STAGES:
            continue
        label = f"{row['implementation']}, H = {row['heads']}"
        if phase == "decode":
            if row["rows_each"] != 1 or stage != "whole":
                continue
            label += f", batch {row['requests']}"
        found.setdefault((label, stage), []).append((row["keys"], row["speedup"]))
    return {key: sorted(points) for key, points in found.items()}


def _speedup(axes, result: dict, phase: str) -> None:
    colours: dict[str, str] = {}
    for (label, stage), points in curves(result["rows"], phase).items():
        colour = colours.setdefault(label, f"C{len(colours) % 10}")
        name = f"{label}, {stage}" if phase == "prefill" else label
        axes.plot(*zip(*points), marker="o", markersize=3, color=colour, linestyle=STAGES[stage], label=name)
    axes.axhline(1, color="grey", linewidth=0.8)
    _context_axis(axes)
    axes.set_ylabel("speed-up over stock vLLM's indexer")
    axes.set_ylim(bottom=0)
    axes.set_title(phase)
    axes.legend(fontsize="x-small")


def _growth(axes, result: dict, name: str) -> None:
    for number, implementation in enumerate(dict.fromkeys(row["implementation"] for row in result["growth"])):
        rows = [row for row in result["growth"] if row["implementation"] == implementation]
        keys = [row["keys"] for row in rows]
        model = [row["flop"] * rows[-1]["median_us"] / rows[-1]["flop"] for row in rows]
        axes.plot(keys, [row["median_us"] for row in rows], marker="o", color=f"C{number}", label=implementation)
        axes.plot(keys, model, color=f"C{number}", linestyle="--", label=f"{implementation}: h N + H N / B")
    _context_axis(axes)
    axes.set_yscale("log")
    axes.set_ylabel(f"policy misa, {result['growth'][0]['rows_each']} queries, us")
    axes.set_title(name)
    axes.legend(fontsize="x-small")


def _context_axis(axes) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda keys, _: f"{keys / 1024:g}K")
    axes.set_xlabel("context, keys")
    axes.grid(alpha=0.3)
