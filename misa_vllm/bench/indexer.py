"""Time of one indexer step (routing, scores, selection) on the CPU: policy misa against dsa and the reference.

All variants take the same inputs in the same process and are timed in turn, run by run, so that a busy machine
slows them alike; what is printed are medians. The queries are the last ones of one request.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from misa_vllm import __version__, reference
from misa_vllm.bench.report import commit, cpu_name
from misa_vllm.index_cache import INDEX_HEAD_DIM, PAGE_BYTES, PAGE_TOKENS
from misa_vllm.kernels import choose_kernels
from misa_vllm.rows import QueryRows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 256], help="queries per step (default: 1 256)")
    parser.add_argument("--keys", type=int, default=32768, help="context length (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=64, help="index heads H (default: %(default)s)")
    parser.add_argument("--active-heads", type=int, default=8, help="routed heads h (default: %(default)s)")
    parser.add_argument("--pool-blocks", type=int, nargs="+", default=[64, 1024], help="B (default: 64 1024)")
    parser.add_argument("--k", type=int, default=2048, help="selected tokens (default: %(default)s)")
    threads = torch.get_num_threads()
    parser.add_argument("--threads", type=int, default=threads, help="torch threads (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="time per number of queries (default: %(default)s)")
    parser.add_argument("--no-reference", action="store_true", help="leave the torch reference out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")


def make_request(queries: int, keys: int, heads: int):
    """q, gates, index_cache and rows of the last `queries` tokens of one request, its pages in random order."""
    generator = torch.Generator().manual_seed(0)
    num_pages = -(-keys // PAGE_TOKENS)
    index_cache = torch.zeros(num_pages, PAGE_BYTES, dtype=torch.uint8)
    pages = torch.randperm(num_pages, generator=generator)
    tokens = torch.arange(keys)
    slots = pages[tokens // PAGE_TOKENS] * PAGE_TOKENS + tokens % PAGE_TOKENS
    reference.write_index_keys(torch.randn(keys, INDEX_HEAD_DIM, generator=generator), index_cache, slots)
    reference.update_page_means(index_cache, slots)
    q = torch.randn(queries, heads, INDEX_HEAD_DIM, generator=generator).to(torch.float8_e4m3fn)
    gates = torch.randn(queries, heads, generator=generator) * (INDEX_HEAD_DIM * heads) ** -0.5
    visible = torch.arange(keys - queries, keys, dtype=torch.int32) + 1
    request = torch.zeros(queries, dtype=torch.int32)
    return q, gates, index_cache, QueryRows(pages.int().unsqueeze(0), request, visible, keys)


def make_steps(args: argparse.Namespace, queries: int) -> dict[str, Callable[[], None]]:
    """Name -> one indexer step."""
    kernels = choose_kernels("cpu")
    q, gates, index_cache, rows = make_request(queries, args.keys, args.heads)
    out = torch.empty(queries, args.k, dtype=torch.int32)

    def misa(implementation, pool_block):
        heads = implementation.route_heads(q, gates, index_cache, rows, args.active_heads, pool_block)
        implementation.select_tokens(q, gates, heads, index_cache, rows, args.k, out)

    steps = {"dsa": lambda: kernels.select_tokens(q, gates, None, index_cache, rows, args.k, out)}
    for pool_block in args.pool_blocks:
        steps[f"misa, B = {pool_block}"] = lambda pool_block=pool_block: misa(kernels, pool_block)
    if not args.no_reference:
        steps["reference misa"] = lambda: misa(reference, args.pool_blocks[-1])
    return steps


def time_in_turn(steps: dict[str, Callable[[], None]], seconds: float) -> dict[str, list[float]]:
    """Name -> seconds of each timed run, at least three of every step.

    A timed run follows an untimed one of the same step, so that torch's threads are awake: waking one takes as long as
    a whole step of one query.
    """
    times = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 3:
        for name, step in steps.items():
            step()
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return times


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    result = {
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "threads": args.threads,
        "torch": torch.__version__,
        "misa_vllm": __version__,
        "commit": commit(),
        "kernels": choose_kernels("cpu").__name__,
        "load_average": os.getloadavg()[0],
        "keys": args.keys,
        "heads": args.heads,
        "active_heads": args.active_heads,
        "k": args.k,
        "rows": [],
    }
    for queries in args.queries:
        times = time_in_turn(make_steps(args, queries), args.seconds)
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        for name, seconds in times.items():
            row = {"queries": queries, "step": name, "runs": len(seconds)}
            row |= {"median_ms": medians[name] * 1e3, "least_ms": min(seconds) * 1e3}
            row |= {"speedup_over_dsa": medians["dsa"] / medians[name]}
            if "reference misa" in medians:
                row["speedup_over_reference"] = medians["reference misa"] / medians[name]
            result["rows"].append(row)
    print(table(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def table(result: dict) -> str:
    """The figures as a Markdown table under one line that names the machine."""
    lines = [
        f"{result['cpu']}, {result['threads']} threads, torch {result['torch']}, commit {result['commit']}, "
        f"load {result['load_average']:.1f}; H = {result['heads']}, h = {result['active_heads']}, "
        f"{result['keys']} keys, k = {result['k']}",
        "",
        "| queries | step | median | least | runs | over dsa | over reference |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        over_reference = row.get("speedup_over_reference")
        lines.append(
            f"| {row['queries']} | {row['step']} | {row['median_ms']:.3f} ms | {row['least_ms']:.3f} ms "
            f"| {row['runs']} | {row['speedup_over_dsa']:.2f}x "
            f"| {'' if over_reference is None else f'{over_reference:.1f}x'} |"
        )
    return "\n".join(lines)
