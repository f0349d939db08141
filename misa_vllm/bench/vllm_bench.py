"""vLLM's own benchmarks, `vllm bench serve`, `latency` and `throughput`, of one model under several engines in turn.

An engine is stock vLLM or this backend with one of its policies. Prompts are random tokens, the same for all, and
prefix caching is off, so that each is prefilled; every tool starts an engine of its own. FOLDER gets what each tool
printed and its JSON file (TOOL_ENGINE.txt, .json), the engines' logs (.log), and summary.json with the figures below,
versions and the command. "over" is how many times as fast as the first engine: its time over the engine's, or the
engine's rate over its.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from misa_vllm import processes
from misa_vllm.bench import report
from misa_vllm.bench.report import BenchmarkError, at_least
from misa_vllm.bench.serve_shapes import POLICIES, json_object

ENGINES = ("stock", *POLICIES)
VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
FIGURES = {
    "serve": {
        "median_ttft_ms": "time to first token, median, ms",
        "p99_ttft_ms": "time to first token, 99th percentile, ms",
        "median_tpot_ms": "time per output token, median, ms",
        "total_token_throughput": "tokens/s",
    },
    "latency": {"avg_latency": "time of a request, mean, s"},
    "throughput": {"tokens_per_second": "tokens/s", "requests_per_second": "requests/s"},
}
"""Tool -> field of its JSON file -> what it is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    count = at_least(1)
    parser.add_argument("model", help="a model's folder or name")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where everything is kept")
    text = "the first is what the others are compared with (default: stock misa)"
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["stock", "misa"], help=text)
    parser.add_argument("--tools", nargs="+", choices=FIGURES, default=list(FIGURES), help="default: all")
    parser.add_argument("--input-len", type=count, default=32768, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--output-len", type=count, default=64, help="tokens of an answer (default: %(default)s)")
    text = "requests of serve and throughput (default: %(default)s)"
    parser.add_argument("--num-prompts", type=count, default=16, help=text)
    parser.add_argument("--max-concurrency", type=count, default=4, help="serve: at a time (default: %(default)s)")
    parser.add_argument("--num-iters", type=count, default=5, help="latency: requests (default: %(default)s)")
    text = 'the backend\'s other options, e.g. \'{"pool_block": 128}\''
    parser.add_argument("--options", type=json_object, default={}, metavar="JSON", help=text)
    text = "options of vllm serve for all engines, as one text behind an equals sign: --vllm='--tensor-parallel-size 8'"
    parser.add_argument("--vllm", type=shlex.split, default=[], metavar="TEXT", help=text)
    text = "seconds until a tool, or a server's start, is given up (default: %(default)s)"
    parser.add_argument("--timeout", type=count, default=1800, help=text)


def engine_arguments(engine: str, args: argparse.Namespace) -> list[str]:
    """What tells an engine from stock vLLM, and what all of them are given."""
    given = ["--no-enable-prefix-caching", *args.vllm]  # serve warms up with a prompt that it then measures
    if engine == "stock":
        return given
    options = json.dumps({"misa": {"policy": engine, **args.options}})
    return ["--attention-backend", "misa", "--additional-config", options, *given]


def command_of(tool: str, args: argparse.Namespace, results: Path) -> list[str]:
    """`vllm bench TOOL` without what belongs to its engine, or its server."""
    command = [*VLLM, "bench", tool, "--model", args.model]
    if tool == "latency":
        return [
            *(*command, "--batch-size", "1", "--num-iters-warmup", "1", "--num-iters", str(args.num_iters)),
            *("--input-len", str(args.input_len), "--output-len", str(args.output_len)),
            *("--output-json", str(results)),
        ]
    command += [
        *("--dataset-name", "random", "--num-prompts", str(args.num_prompts), "--seed", "0"),
        *("--random-input-len", str(args.input_len), "--random-output-len", str(args.output_len)),
    ]
    if tool == "throughput":
        return [*command, "--output-json", str(results)]
    return [
        *(*command, "--backend", "openai", "--endpoint", "/v1/completions", "--ignore-eos", "--temperature", "0"),
        *("--max-concurrency", str(args.max_concurrency), "--num-warmups", "1", "--save-result"),
        *("--result-dir", str(results.parent), "--result-filename", results.name),
    ]


def tokenizer_arguments(options: Sequence[str]) -> list[str]:
    """The options that the client of a server needs as well."""
    found = []
    for name in ("--tokenizer", "--tokenizer-mode"):
        for number, option in enumerate(options):
            if option == name:
                found += options[number : number + 2]
            elif option.startswith(f"{name}="):
                found.append(option)
    return found


def run_tool(tool: str, engine: str, args: argparse.Namespace) -> tuple[dict | None, str | None]:
    """(the tool's figures, None), or (None, what went wrong)."""
    results = args.output / f"{tool}_{engine}.json"
    results.unlink(missing_ok=True)
    command = command_of(tool, args, results)
    printed, log = results.with_suffix(".txt"), results.with_suffix(".log")
    environment = dict(os.environ, VLLM_LOGGING_STREAM="ext://sys.stderr")  # the tool's own words alone go to .txt

    def finish(command: list[str]) -> str | None:
        with printed.open("wb") as stdout, log.open("ab") as stderr:
            return processes.run(command, args.timeout, stdout, stderr, environment)

    log.write_bytes(b"")
    if tool == "serve":
        port = processes.free_port()
        server = [
            *(*VLLM, "serve", args.model, "--host", "127.0.0.1", "--port", str(port)),
            *engine_arguments(engine, args),
        ]
        client = [*command, "--host", "127.0.0.1", "--port", str(port), *tokenizer_arguments(args.vllm)]
        try:
            with processes.running_server(server, port, args.output / f"server_{engine}.log", args.timeout):
                problem = finish(client)
        except processes.ServerError as error:
            return None, str(error)
    else:
        problem = finish([*command, *engine_arguments(engine, args)])
    if problem is None and not results.exists():
        problem = f"it wrote no {results.name}"
    if problem is not None:
        print(*processes.tail(log), sep="\n", file=sys.stderr)
        return None, problem
    figures = json.loads(results.read_text())
    if figures.get("failed"):
        return None, f"{figures['failed']} of its requests failed: see {log}"
    if missing := FIGURES[tool].keys() - figures.keys():
        return None, f"{results} lacks {', '.join(sorted(missing))}"
    return {name: figures[name] for name in FIGURES[tool]}, None


def run(args: argparse.Namespace) -> int:
    report.require_folder(args.output)
    args.output.mkdir(parents=True, exist_ok=True)
    result = {
        "benchmark": "vllm",
        "command": shlex.join(["misa-bench", *sys.argv[1:]]),
        "environment": report.environment(),
        "arguments": report.plain(vars(args)),
        "figures": [],
        "failures": [],
    }
    for tool in args.tools:
        for engine in args.engines:
            start = time.perf_counter()
            figures, problem = run_tool(tool, engine, args)
            print(f"{time.perf_counter() - start:6.1f} s  {tool}, {engine}", file=sys.stderr, flush=True)
            if problem is None:
                result["figures"].append({"tool": tool, "engine": engine} | figures)
            else:
                result["failures"].append(f"{tool}, {engine}: {problem}")
            report.write_text(args.output / "summary.json", json.dumps(result, indent=1) + "\n")
    if not result["figures"]:
        raise BenchmarkError(f"no engine was measured: {result['failures'][0]}")
    print(as_text(result))
    for failure in result["failures"]:
        print(f"misa-bench: failed: {failure}", file=sys.stderr)
    return 1 if result["failures"] else 0


def speedups(figures: Sequence[dict], first: str) -> dict[tuple[str, str, str], float]:
    """(tool, engine, field) -> how many times as fast as the engine `first`."""
    base = {one["tool"]: one for one in figures if one["engine"] == first}
    ratios = {}
    for one in figures:
        for name in FIGURES[one["tool"]]:
            before, after = base.get(one["tool"], {}).get(name), one[name]
            if before and after:  # answers of one token have no time per further token
                is_rate = name.endswith(("throughput", "per_second"))
                ratios[one["tool"], one["engine"], name] = after / before if is_rate else before / after
    return ratios


def as_text(result: dict) -> str:
    """The figures as an aligned table under one line that names the machine."""
    first = result["arguments"]["engines"][0]
    ratios = speedups(result["figures"], first)
    cells = []
    for tool, names in FIGURES.items():
        for name, meaning in names.items():
            for one in result["figures"]:
                if one["tool"] != tool:
                    continue
                ratio = ratios.get((tool, one["engine"], name))
                cells.append([tool, meaning, one["engine"], f"{one[name]:.4g}", f"{ratio:.2f}x" if ratio else ""])
    header = ["tool", "figure", "engine", "value", f"over {first}"]
    args = result["arguments"]
    setting = f"prompts of {args['input_len']} random tokens, answers of {args['output_len']}"
    return "\n".join([
        report.headline(result["environment"]), setting, "", report.aligned_table(header, cells, left=3)
    ])  # fmt: skip
