"""Indexer kernels on one GPU: ours against stock vLLM's, on the same random inputs, in one process and in turn.

Stages of ours: page means (of the pages a step wrote), route (h heads per query), select (k tokens by the routed
heads), whole (policy misa as served: route + select), exact (k tokens by all heads), hierarchical (policy
hierarchical as served). Stages of stock: gather (prefill copies the keys out of the pages; not part of whole), scores,
top-k, whole (scores + top-k). Before a case is timed, our selections are compared with stock's; where they differ
the case is reported as failed. Times are medians over passes, each pass on several sets of inputs and with an L2
cache that holds none of them; "over stock" is the time of stock's whole indexer over the stage's.
"""

import argparse
import itertools
import json
import math
import sys
import time
import traceback
from pathlib import Path

import torch

from misa_vllm.bench import report
from misa_vllm.bench.report import BenchmarkError, at_least
from misa_vllm.bench.workload import Case, KeyPool, Options, make_inputs, work
from misa_vllm.index_cache import PAGE_TOKENS
from misa_vllm.settings import STATISTICS

IMPLEMENTATIONS = ("cuda", "triton")
PHASES = ("prefill", "decode")
GROWTH_KEYS = [2**i for i in range(13, 21)]
TRANSIENT_ROWS, TRANSIENT_KEYS = 8192, 2**20
"""The step whose transient memory is measured with --growth."""
PREFILL_CALLS = 4
DECODE_CALLS = range(4, 17)
"""Calls per timed pass, fewest and most: enough that the pass's start does not count."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    count = at_least(1)
    kernels = {"nargs": "+", "choices": IMPLEMENTATIONS, "default": list(IMPLEMENTATIONS)}
    parser.add_argument("--kernels", **kernels, help="implementations, those available are timed (default: all)")
    phases = {"nargs": "*", "choices": PHASES, "default": list(PHASES)}
    parser.add_argument("--phases", **phases, help="what to time; none: only --growth and --paper (default: both)")
    parser.add_argument("--heads", type=count, nargs="+", default=[64, 32], help="index heads H (default: 64 32)")
    parser.add_argument("--active-heads", type=count, default=8, help="routed heads h (default: %(default)s)")
    parser.add_argument("--k", type=count, default=2048, help="selected tokens (default: %(default)s)")
    parser.add_argument("--pool-block", type=count, default=1024, help="B (default: %(default)s)")
    parser.add_argument("--candidates", type=count, default=8192, help="C, hierarchical (default: %(default)s)")
    text = "what heads are routed by (default: %(default)s)"
    parser.add_argument("--statistic", choices=STATISTICS, default=STATISTICS[0], help=text)
    parser.add_argument("--min-context", type=at_least(0), help="the backend's option (default: 0)")
    parser.add_argument("--rows", type=count, default=2048, help="prefill: queries M (default: %(default)s)")
    keys = [32768, 65536, 131072]
    parser.add_argument("--keys", type=count, nargs="+", default=keys, help="prefill: N (default: 32768 65536 131072)")
    batches = [1, 8, 32, 128]
    parser.add_argument("--batches", type=count, nargs="+", default=batches, help="decode (default: 1 8 32 128)")
    keys = [4096, 16384, 131072]
    parser.add_argument("--decode-keys", type=count, nargs="+", default=keys, help="N (default: 4096 16384 131072)")
    next_n = {"type": int, "nargs": "+", "choices": (1, 2, 4), "default": [1, 2]}
    parser.add_argument("--next-n", **next_n, help="decode: queries of each request (default: 1 2)")
    text = "decode: the engine's, which bounds captured grids and sizes stock's score rows (default: N)"
    parser.add_argument("--max-model-len", type=count, default=1, help=text)
    text = "factor of all scores, e.g. 1e-15: as far from the ordinary as scores of untrained weights (default: 1)"
    parser.add_argument("--gate-scale", type=float, default=1.0, help=text)
    text = "seconds: no case is started later (default: no limit)"
    parser.add_argument("--budget", type=count, help=text)
    text = "time policy misa from 8192 to 1048576 keys, and measure the transient memory of 8192 rows at 1048576"
    parser.add_argument("--growth", action="store_true", help=text)
    text = "time the paper's released approach in plain torch too (misa_vllm/bench/paper.py)"
    parser.add_argument("--paper", action="store_true", help=text)
    parser.add_argument("--paper-rows", type=count, default=1024, help="M for --paper (default: %(default)s)")
    parser.add_argument("--repeats", type=count, default=11, help="samples per median (default: %(default)s)")
    text = "launch anew for each sample instead of replaying a CUDA graph: includes what launching costs the host"
    parser.add_argument("--eager", action="store_true", help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also plot the speed-up over context (.png, .svg)")


def cases_of(args: argparse.Namespace) -> dict[str, list[Case]]:
    """Section -> cases. Raises BenchmarkError where the arguments do not fit each other."""

    def prefill(heads, rows, keys):
        if rows > keys:
            raise BenchmarkError(f"{rows} queries do not end {keys} keys: raise --keys or lower --rows")
        return Case("prefill", heads, keys, 1, rows)

    def decode(heads, batch, keys, next_n):
        if next_n > keys:
            raise BenchmarkError(f"{next_n} queries do not end {keys} keys: raise --decode-keys")
        return Case("decode", heads, keys, batch, next_n)

    if args.active_heads > min(args.heads):
        raise BenchmarkError(f"--active-heads {args.active_heads} is more than --heads {min(args.heads)}")
    if args.pool_block % PAGE_TOKENS:
        raise BenchmarkError(f"--pool-block {args.pool_block} is not a multiple of {PAGE_TOKENS}")
    if args.candidates < args.k:
        raise BenchmarkError(f"--candidates {args.candidates} is less than --k {args.k}")
    if not (args.phases or args.growth or args.paper):
        raise BenchmarkError("nothing to time: name --phases, --growth or --paper")
    sections = {}
    if "prefill" in args.phases:
        sections["prefill"] = [prefill(heads, args.rows, keys) for heads in args.heads for keys in args.keys]
    if "decode" in args.phases:
        sizes = itertools.product(args.heads, args.batches, args.decode_keys, args.next_n)
        sections["decode"] = [decode(*size) for size in sizes]
    if args.growth:
        sections["growth"] = [prefill(args.heads[0], min(args.rows, GROWTH_KEYS[0]), keys) for keys in GROWTH_KEYS]
    if args.paper:
        sections["paper"] = [prefill(args.heads[0], min(args.paper_rows, keys), keys) for keys in args.keys]
    return sections


def calls_and_sets(case: Case, l2_bytes: int) -> tuple[int, int]:
    """Calls per timed pass, and on how many sets of inputs: on one of its own each, unless one exceeds the cache."""
    enough = 2 * l2_bytes
    calls = PREFILL_CALLS
    if case.phase == "decode":
        calls = min(DECODE_CALLS[-1], max(DECODE_CALLS[0], math.ceil(enough / case.input_bytes)))
    return calls, 1 if case.input_bytes >= enough else calls


def run(args: argparse.Namespace) -> int:
    report.require_writable(args.json, args.plot)
    sections = cases_of(args)
    if args.plot:
        report.require_plots(args.plot)
    report.require_gpu()
    result = Benchmark(args, torch.device("cuda", torch.cuda.current_device())).run(sections)
    print(as_text(result))
    if args.json:
        report.write_text(args.json, json.dumps(result, indent=1) + "\n")
    if args.plot:
        from misa_vllm.bench.plot import plot

        with report.replacing(args.plot) as file:
            plot(result, file)
    for failure in result["failures"]:
        print(f"misa-bench: failed: {failure}", file=sys.stderr)
    return 1 if result["failures"] else 0


class Benchmark:
    """Runs the sections on `device` and collects the figures."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        from misa_vllm.bench import indexers

        self.start = time.perf_counter()
        self.args = args
        self.indexers = indexers
        self.device = device
        self.kernels, self.left_out = indexers.available_kernels(args.kernels, self.device)
        if not self.kernels:
            raise BenchmarkError(f"none of our kernels run here: {'; '.join(self.left_out)}")
        try:
            from misa_vllm.seam.stock_kernels import stock_indexer_kernels

            self.stock = stock_indexer_kernels(self.device)
        except (RuntimeError, ImportError) as error:
            raise BenchmarkError(str(error).splitlines()[0]) from None
        min_context = args.min_context or 0
        route_from = indexers.settings("misa", args.heads[0], args, min_context).route_from
        self.options = Options(
            args.active_heads, args.pool_block, args.candidates, args.k, route_from, args.statistic
        )
        self.min_context = min_context
        self.failures: list[str] = []

    def run(self, sections: dict[str, list[Case]]) -> dict:
        from misa_vllm.bench.timing import l2_bytes

        self.l2_bytes = l2_bytes(self.device)
        cases = itertools.chain(*sections.values())
        pages = [calls_and_sets(case, self.l2_bytes)[1] * case.requests * case.pages_each for case in cases]
        if "growth" in sections:
            pages.append(TRANSIENT_KEYS // PAGE_TOKENS)
        try:
            self.pool = KeyPool(max(pages), self.device, statistic=self.options.statistic)
        except torch.cuda.OutOfMemoryError:
            raise BenchmarkError(
                f"{max(pages)} pages of keys do not fit this GPU: lower --batches, --decode-keys or --keys"
            ) from None
        result = {
            "benchmark": "kernels",
            "environment": report.environment(),
            "arguments": report.plain(vars(self.args)),
            "min_context": self.min_context,
            "l2_bytes": self.l2_bytes,
            "left_out": self.left_out,
            "rows": [],
            "checks": [],
            "transient": [],
            "growth": [],
            "paper": [],
        }
        if "growth" in sections:  # before anything has left a workspace behind
            result["transient"] = self._transient()
        self.checks = result["checks"]
        for phase in PHASES:
            for case in sections.get(phase, ()):
                result["rows"] += self._guarded(str(case), self._stages, case)
        for case in sections.get("growth", ()):
            result["growth"] += self._guarded(f"growth, {case}", self._growth, case)
        for case in sections.get("paper", ()):
            result["paper"] += self._guarded(f"paper, {case}", self._paper, case)
        result["failures"] = self.failures
        result["seconds"] = time.perf_counter() - self.start
        return result

    def _guarded(self, what: str, measure, *args) -> list[dict]:
        """What `measure` gives; a failure is noted and leaves the other figures standing."""
        if self.args.budget is not None and time.perf_counter() - self.start > self.args.budget:
            self.left_out.append(f"left out, --budget {self.args.budget} was spent: {what}")
            return []
        try:
            return measure(*args)
        except Exception as error:  # whatever a kernel raises
            traceback.print_exc()
            self.failures.append(f"{what}: {report.one_line(error)}")
            return []
        finally:
            torch.cuda.empty_cache()
            print(f"{time.perf_counter() - self.start:6.1f} s  {what}", file=sys.stderr, flush=True)

    def _inputs(self, case: Case):
        calls, sets = calls_and_sets(case, self.l2_bytes)
        most = max(case.keys, self.args.max_model_len) if case.phase == "decode" else case.keys
        scale = self.args.gate_scale
        return calls, [make_inputs(case, self.pool, number, most, scale) for number in range(sets)]

    def _time(self, case: Case, calls: int, sets: int, stages: dict, eager: bool) -> list[dict]:
        """Time stages {(implementation, name): call on a set}; the rows of the result."""
        from misa_vllm.bench.timing import time_in_turn

        def one_pass(stage):
            def all_calls():
                for number in range(calls):
                    stage(number % sets)

            return all_calls

        passes = {key: one_pass(stage) for key, stage in stages.items()}
        for run_once in passes.values():
            run_once()
        torch.cuda.synchronize(self.device)
        timings = time_in_turn(passes, calls, self.args.repeats, self.device, use_graphs=not eager)
        stock = timings.get(("stock", "whole"))
        rows = []
        for (implementation, stage), timing in timings.items():
            counted = work(case, "exact" if (implementation, stage) == ("stock", "whole") else stage, self.options)
            rows.append(
                {
                    "phase": case.phase,
                    "heads": case.heads,
                    "requests": case.requests,
                    "rows_each": case.rows_each,
                    "keys": case.keys,
                    "implementation": implementation,
                    "stage": stage,
                    "median_us": timing.median_us,
                    "p90_us": timing.p90_us,
                    "runs": timing.runs,
                    "tflops": counted.tflops(timing.median_us),
                    "tb_per_s": counted.terabytes_per_s(timing.median_us),
                    "speedup": stock.median_us / timing.median_us if stock else None,
                }
            )
        return rows

    def _stages(self, case: Case) -> list[dict]:
        calls, inputs = self._inputs(case)
        stock = self.indexers.StockIndexer(self.stock, case, inputs, self.options)
        stages = {("stock", name): stage for name, stage in stock.stages().items()}
        for name, kernels in self.kernels.items():
            try:
                ours = self.indexers.OurIndexer(kernels, case, inputs, self.options, self.args, self.min_context)
                checks = self.indexers.check(ours, stock)
            except Exception as error:  # the other implementation is still worth its figures
                traceback.print_exc()
                self.failures.append(f"{case}, {name}: {report.one_line(error)}")
                continue
            self.checks.append({"case": str(case), "implementation": name} | checks)
            if problem := self.indexers.disagreement(checks):
                self.failures.append(f"{case}, {name}: {problem}")
            else:
                stages |= {(name, stage): call for stage, call in ours.stages().items()}
        rows = self._time(case, calls, len(inputs), stages, self.args.eager)
        for row in rows:
            if (row["implementation"], row["stage"]) == ("stock", "top-k"):
                row["kernel"] = stock.select_name
        return rows

    def _growth(self, case: Case) -> list[dict]:
        calls, inputs = self._inputs(case)
        stages = {}
        for name, kernels in self.kernels.items():
            ours = self.indexers.OurIndexer(kernels, case, inputs, self.options, self.args, self.min_context)
            stages[name, "whole"] = ours.whole
        rows = self._time(case, calls, len(inputs), stages, self.args.eager)
        for row in rows:
            row["flop"] = work(case, "whole", self.options).flop
        return rows

    def _transient(self) -> list[dict]:
        case = Case("prefill", self.args.heads[0], TRANSIENT_KEYS, 1, TRANSIENT_ROWS)
        inputs = [make_inputs(case, self.pool, 0, case.keys)]

        def measure(name, kernels):
            ours = self.indexers.OurIndexer(kernels, case, inputs, self.options, self.args, self.min_context)
            taken = {"bytes": self.indexers.transient_bytes(ours), "counted_bytes": ours.workspace_bytes()}
            return [{"implementation": name, "rows": case.rows, "keys": case.keys} | taken]

        rows = []
        for name, kernels in self.kernels.items():
            rows += self._guarded(f"transient memory of {name}, {case}", measure, name, kernels)
        return rows

    def _paper(self, case: Case) -> list[dict]:
        from misa_vllm.bench.paper import PaperIndexer

        calls, inputs = self._inputs(case)
        stock = self.indexers.StockIndexer(self.stock, case, inputs, self.options)
        paper = PaperIndexer(case, inputs, self.options)
        stages = {("stock", "whole"): stock.whole, ("paper in torch", "whole"): paper.whole}
        for name, kernels in self.kernels.items():
            ours = self.indexers.OurIndexer(kernels, case, inputs, self.options, self.args, self.min_context)
            stages[name, "whole"] = ours.whole
            shared = self.indexers.shared_tokens(paper.whole(0), ours.whole(0), case.keys)
            self.checks.append({"case": f"paper, {case}", "implementation": name, "whole": shared.mean().item()})
        return self._time(case, calls, len(inputs), stages, eager=True)


# ---------------------------------------------------------------- as text

HEADER = ["phase", "H", "queries", "keys", "by", "stage", "us", "p90", "TFLOP/s", "TB/s", "over stock"]


def as_text(result: dict) -> str:
    """All figures of a result as aligned tables, under one line that names the machine."""
    args = result["arguments"]
    parts = [
        report.headline(result["environment"]),
        f"h = {args['active_heads']}, k = {args['k']}, B = {args['pool_block']}, C = {args['candidates']}, "
        f"{'eager launches' if args['eager'] else 'CUDA graph replays'}, medians of {args['repeats']}, "
        f"{result['seconds']:.0f} s in all",
        *result["left_out"],
    ]
    if result["checks"]:
        parts += ["", "tokens shared with stock (mean, least row), heads with the reference:"]
        parts += [_check_line(check) for check in result["checks"]]
    if result["rows"]:
        parts += ["", report.aligned_table(HEADER, map(_cells, result["rows"]), left=1), "", *_means(result["rows"])]
    for row in result["transient"]:
        parts.append(
            f"transient memory, {row['rows']} rows x {row['keys']} keys, {row['implementation']}: "
            f"{row['bytes'] / 2**20:.1f} MiB, {row['counted_bytes'] / 2**20:.1f} MiB counted in vLLM's profile"
        )
    if result["growth"]:
        parts += ["", "growth of policy misa; model: time in proportion to h N + H N / B"]
        parts += _growth_lines(result["growth"])
    if result["paper"]:
        parts += ["", "the paper's released approach in plain torch (bf16 keys, keys pooled anew, torch.topk), eager:"]
        parts += [report.aligned_table(HEADER, map(_cells, result["paper"]), left=1)]
    return "\n".join(parts)


def _queries(row: dict) -> str:
    return str(row["rows_each"]) if row["phase"] == "prefill" else f"{row['requests']} x {row['rows_each']}"


def _cells(row: dict) -> list[str]:
    stage = f"{row['stage']} ({row['kernel']})" if "kernel" in row else row["stage"]
    is_prefill = row["phase"] == "prefill"
    part = row["implementation"] == "stock" and row["stage"] != "whole"
    return [
        row["phase"],
        str(row["heads"]),
        _queries(row),
        str(row["keys"]),
        row["implementation"],
        stage,
        f"{row['median_us']:.1f}",
        f"{row['p90_us']:.1f}",
        f"{row['tflops']:.0f}" if is_prefill and row["tflops"] else "",
        f"{row['tb_per_s']:.2f}" if not is_prefill or not row["tflops"] else "",
        "" if part or row["speedup"] is None else f"{row['speedup']:.2f}x",
    ]


def _check_line(check: dict) -> str:
    shares = [
        f"{name} {value:.5f}" + (f" ({check[least]:.4f})" if (least := f"{name}, least row") in check else "")
        for name, value in check.items()
        if isinstance(value, float) and not name.endswith("least row")
    ]
    return f"  {check['case']}, {check['implementation']}: {', '.join(shares)}"


def _means(rows: list[dict]) -> list[str]:
    """Geometric means of the speed-ups, one line for each phase, implementation and stage."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        if row["implementation"] != "stock" and row["stage"] in ("whole", "exact", "hierarchical"):
            groups.setdefault((row["phase"], row["implementation"], row["stage"]), []).append(row["speedup"])
    return [
        f"{phase}, {implementation}, {stage}: {math.exp(sum(map(math.log, values)) / len(values)):.2f}x over stock "
        f"(geometric mean of {len(values)}; least {min(values):.2f}x)"
        for (phase, implementation, stage), values in groups.items()
    ]


def growth_slope(rows: list[dict]) -> float:
    """Exponent of time over FLOP, least squares in the logarithms: 1 where time follows h N + H N / B."""
    x = [math.log(row["flop"]) for row in rows]
    y = [math.log(row["median_us"]) for row in rows]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    return sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y)) / sum((a - x_mean) ** 2 for a in x)


def _growth_lines(growth: list[dict]) -> list[str]:
    lines = []
    for name in dict.fromkeys(row["implementation"] for row in growth):
        rows = [row for row in growth if row["implementation"] == name]
        per_flop = rows[-1]["median_us"] / rows[-1]["flop"]
        table = [
            [str(row["keys"]), f"{row['median_us']:.1f}", f"{row['flop'] * per_flop:.1f}",
             f"{row['median_us'] / (row['flop'] * per_flop):.2f}"]
            for row in rows
        ]  # fmt: skip
        header = ["keys", f"us, {name}", "model, through the last", "measured / model"]
        lines.append(report.aligned_table(header, table, left=0))
        if len(rows) > 1:
            longer = rows[len(rows) // 2 - 1 :]
            slope = f"exponent of time over h N + H N / B: {growth_slope(rows):.3f}"
            lines.append(f"{slope} over all, {growth_slope(longer):.3f} from {longer[0]['keys']} keys on")
    return lines
