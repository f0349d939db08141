"""The benchmark commands where there is no GPU: arguments, counts of work, agreement checks, tables, error lines."""

import argparse
import json
import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from misa_vllm import reference
from misa_vllm.bench import cli, decode_profile, indexers, kernels, report, serve_shapes, timing
from misa_vllm.bench.paper import PaperIndexer
from misa_vllm.bench.plot import curves
from misa_vllm.bench.report import BenchmarkError
from misa_vllm.bench.timing import Timing, percentile
from misa_vllm.bench.workload import Case, KeyPool, Options, Work, make_inputs, work
from misa_vllm.config import resolve_settings

ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "hardware": "NVIDIA Test",
    "driver": "1.2",
    "cuda": "13.0",
    "torch": "2.13.0",
    "triton": "3.7",
    "vllm": "0.32.0",
    "misa_vllm": "0.1.0",
    "commit": "abc1234",
}
MIB = 2**20


def arguments(*words):
    return cli.parser(words[0]).parse_args(words)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are small here, and threads that wait for each other cost more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- command line


def test_default_cases():
    sections = kernels.cases_of(arguments("kernels"))
    assert list(sections) == ["prefill", "decode"]
    assert [(case.heads, case.keys) for case in sections["prefill"]] == [
        (heads, keys) for heads in (64, 32) for keys in (32768, 65536, 131072)
    ]
    assert len(set(sections["decode"])) == 2 * 4 * 3 * 2
    assert {case.rows for case in sections["decode"]} == {1, 2, 8, 16, 32, 64, 128, 256}


def test_growth_and_paper_alone():
    sections = kernels.cases_of(arguments("kernels", "--phases", "--growth", "--paper", "--keys", "512"))
    assert list(sections) == ["growth", "paper"]
    assert [case.keys for case in sections["growth"]] == [8192 * 2**i for i in range(8)]
    assert [(case.rows, case.keys) for case in sections["paper"]] == [(512, 512)]


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--rows", "100", "--keys", "99"], "raise --keys or lower --rows"),
        (["--decode-keys", "1"], "raise --decode-keys"),
        (["--heads", "64", "4"], "--active-heads 8 is more than --heads 4"),
        (["--pool-block", "100"], "not a multiple of 64"),
        (["--candidates", "1000"], "less than --k 2048"),
        (["--phases"], "name --phases, --growth or --paper"),
    ],
)
def test_arguments_that_do_not_fit(words, remedy, capsys, tmp_path):
    file = tmp_path / "out.json"
    assert cli.main(["kernels", *words, "--json", str(file)]) == 2
    assert_one_error_line(capsys, remedy)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["kernels", "--rows", "0"],
        ["kernels", "--kernels", "cpu"],
        ["kernels", "--next-n", "3"],
        ["serve-shapes", "--options", "[1]"],
        ["serve-shapes", "--options", "{"],
        ["serve-shapes", "--shapes", "llama"],
        ["nothing"],
        [],
    ],
)
def test_arguments_out_of_range(words):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2


def assert_one_error_line(capsys, part):
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("misa-bench: error: ")
    assert part in line


@pytest.mark.parametrize("command", ["kernels", "serve-shapes"])
def test_no_gpu(command, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main([command, "--json", str(tmp_path / "out.json")]) == 2
    assert_one_error_line(capsys, "no CUDA GPU")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["kernels", "serve-shapes"])
def test_no_vllm(command, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert cli.main([command, "--json", str(tmp_path / "out.json")]) == 2
    assert_one_error_line(capsys, "pip install vllm==0.32.0")
    assert not list(tmp_path.iterdir())


def test_no_matplotlib(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    assert cli.main(["kernels", "--plot", str(tmp_path / "out.png")]) == 2
    assert_one_error_line(capsys, 'pip install "misa_vllm[bench]"')


def test_unknown_plot_format(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert cli.main(["kernels", "--plot", str(tmp_path / "out.plot")]) == 2
    assert_one_error_line(capsys, ".png")


@pytest.mark.parametrize("command", ["kernels", "serve-shapes"])
def test_unwritable_output(command, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert cli.main([command, "--json", str(tmp_path / "file" / "out.json")]) == 2
    assert_one_error_line(capsys, "cannot be written")
    assert cli.main([command, "--json", str(tmp_path)]) == 2
    assert_one_error_line(capsys, "cannot be written")


def test_stock_kernels_say_what_they_need():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    from misa_vllm.seam.stock_kernels import stock_indexer_kernels

    with pytest.raises(RuntimeError, match="^stock vLLM's indexer needs CUDA and DeepGEMM.*$"):
        stock_indexer_kernels(torch.device("cpu"))


# ---------------------------------------------------------------- counts


def options(**changes):
    return Options(**{"active_heads": 2, "pool_block": 128, "candidates": 400, "k": 50, "route_from": 128} | changes)


@pytest.mark.parametrize(
    "case",
    [
        Case("prefill", 4, 700, 1, 650),
        Case("prefill", 4, 700, 1, 1),
        Case("decode", 8, 699, 3, 2),
        Case("decode", 8, 127, 5, 1),
    ],
)
def test_work_counts_every_product_and_byte(case):
    """Against sets of (head, query, key) triples and of bytes addressed."""
    given = options()
    row_visible = [case.keys - case.rows_each + 1 + i for i in range(case.rows_each)]
    products, read = dict.fromkeys(("route", "select", "exact", "whole", "hierarchical"), 0), 0
    for _ in range(case.requests):
        for visible in row_visible:
            blocks = len([b for b in range(20) if (b + 1) * 128 <= visible])
            products["route"] += case.heads * blocks
            products["select"] += given.active_heads * visible
            products["exact"] += case.heads * visible
            routed = case.heads * blocks + given.active_heads * visible
            products["whole"] += routed if visible >= 128 else case.heads * visible
            whole = routed + case.heads * 400
            products["hierarchical"] += whole if visible >= 401 else case.heads * visible
        read += sum(128 + 4 for _ in range(case.keys))
    for stage, count in products.items():
        assert work(case, stage, given).flop == 2 * 128 * count, stage
    assert work(case, "select", given).bytes == work(case, "exact", given).bytes == read
    complete_pages = {page for page in range(case.keys // 64) if page // 2 < case.keys // 128}
    assert work(case, "route", given).bytes == case.requests * len(complete_pages) * 128 * 4
    new_pages = {position // 64 for position in range(case.keys - case.rows_each, case.keys)}
    assert work(case, "page means", given).bytes == case.requests * len(new_pages) * (64 * 132 + 512)
    assert work(case, "top-k", given).bytes == case.requests * sum(row_visible) * 4
    assert work(case, "gather", given).bytes == 2 * read


def test_whole_reads_what_its_stages_read():
    case = Case("decode", 8, 6400, 3, 2)
    route, select, whole, hierarchical = (
        work(case, stage, options()) for stage in ("route", "select", "whole", "hierarchical")
    )
    assert whole == route + select
    assert hierarchical == whole + Work(2 * 128 * 8 * 6 * 400, 6 * 400 * 132)


def test_rates_of_the_design_page():
    """Rates measured on an H200 before this benchmark existed."""
    given = options(active_heads=8, pool_block=1024)
    scores = work(Case("prefill", 64, 32768, 1, 2048), "scores", given)
    assert scores.tflops(965) == pytest.approx(1104, rel=2e-3)
    scores = work(Case("prefill", 64, 131072, 1, 2048), "scores", given)
    assert scores.tflops(4463) == pytest.approx(978, rel=2e-3)
    scores = work(Case("decode", 64, 131072, 32, 1), "scores", given)
    assert scores.terabytes_per_s(145) == pytest.approx(3.82, rel=2e-3)
    scores = work(Case("decode", 32, 131072, 8, 1), "scores", given)
    assert scores.terabytes_per_s(41.1) == pytest.approx(3.37, rel=2e-3)


@pytest.mark.parametrize("l2_bytes", [40 * MIB, 60 * MIB])
def test_no_call_finds_its_inputs_in_the_cache(l2_bytes):
    for cases in kernels.cases_of(arguments("kernels", "--growth")).values():
        for case in cases:
            calls, sets = kernels.calls_and_sets(case, l2_bytes)
            # a set of its own for every call of a pass, or one that the cache cannot hold
            assert sets == calls or sets == 1 and case.input_bytes >= 2 * l2_bytes
            assert calls >= 4


def test_percentile_and_median():
    assert percentile([5, 1, 3], 0.5) == 3
    assert percentile([0, 10], 0.9) == 9
    assert percentile([7], 0.9) == 7
    assert percentile(range(101), 0.9) == 90
    assert Timing.of([3.0, 1.0, 2.0, 10.0]) == Timing(2.5, pytest.approx(7.9), 4)


# ---------------------------------------------------------------- agreement


class DenseStock:
    """`StockIndexerKernels` in torch, from the pages that stock's kernels read."""

    @staticmethod
    def _keys(kv_cache, pages, count):
        pages = kv_cache.flatten(1)[pages.long()]
        keys = pages[:, :8192].reshape(-1, 128).view(torch.float8_e4m3fn).float()
        return keys[:count], pages[:, 8192:].reshape(-1, 4)[:count]

    def gather_keys(self, kv_cache, keys, scales, block_table, starts):
        values, raw = self._keys(kv_cache, block_table[0], int(starts[1]))
        keys.copy_(values.to(torch.float8_e4m3fn))
        scales.copy_(raw)

    def prefill_scores(self, q, keys, scales, gates, first, end):
        scores = torch.einsum("mhd,nd->mhn", q.double(), keys.double() * scales.view(torch.float32).double())
        scores = (scores.relu() * gates.double().unsqueeze(-1)).sum(1)
        return scores.masked_fill(torch.arange(len(keys)) >= end.unsqueeze(1), torch.nan).float()

    def prefill_select(self, scores, first, end, out, k):
        hidden = torch.arange(scores.shape[1]) >= end.unsqueeze(1)
        best = scores.masked_fill(hidden, -torch.inf).topk(min(k, scores.shape[1])).indices
        out.fill_(-1)
        out[:, : best.shape[1]] = best.masked_fill(best >= end.unsqueeze(1), -1).int()

    def decode_schedule(self, visible):
        return visible.clone()

    def decode_scores(self, q, kv_cache, gates, visible, block_table, schedule, max_model_len):
        assert torch.equal(schedule, visible)
        scores = torch.full((len(q), max_model_len), torch.nan)
        for m, end in enumerate(visible.flatten().tolist()):
            keys, raw = self._keys(kv_cache, block_table[m // visible.shape[1]], end)
            one = slice(m, m + 1)
            scores[m, :end] = self.prefill_scores(q[one], keys, raw, gates[one], None, torch.tensor([end]))
        return scores

    def decode_select(self, scores, visible, out, k, max_visible):
        assert max_visible == visible.max()
        self.prefill_select(scores, None, visible.flatten(), out, k)

    def decode_select_name(self, scores, k):
        return "dense"


WORDS = ("--k", "50", "--active-heads", "2", "--pool-block", "128", "--candidates", "200", "--heads", "8", "4")
SMALL = (*WORDS, "--rows", "70", "--keys", "300", "500", "--batches", "1", "3", "--decode-keys", "180", "700")


def compared(case, ours=reference, max_visible=None, statistic="mean", **changes):
    args = arguments("kernels", *WORDS, "--statistic", statistic)
    given = options(candidates=200, statistic=statistic, **changes)
    pool = KeyPool(40, torch.device("cpu"), statistic=statistic)
    inputs = [make_inputs(case, pool, number, max_visible or case.keys) for number in range(2)]
    ours = indexers.OurIndexer(ours, case, inputs, given, args, min_context=0)
    return indexers.check(ours, indexers.StockIndexer(DenseStock(), case, inputs, given))


@pytest.mark.parametrize(
    "case",
    [
        Case("prefill", 8, 500, 1, 70),
        Case("prefill", 8, 250, 1, 200),
        Case("decode", 4, 700, 3, 2),
        Case("decode", 8, 100, 2, 1),
    ],
)
@pytest.mark.parametrize("statistic", ["mean", "mean_positive"])
def test_reference_agrees_with_stock(case, statistic):
    checks = compared(case, max_visible=1024 if case.phase == "decode" else None, statistic=statistic)
    assert indexers.disagreement(checks) is None
    assert {"exact", "select", "whole"} <= checks.keys()
    assert ("hierarchical" in checks) == (case.visible[0] > 200)
    assert ("heads" in checks) == (case.visible[-1] >= 128)


def wrong(**replaced):
    names = ("update_page_means", "route_heads", "select_tokens", "rerank_tokens")
    return SimpleNamespace(**{name: getattr(reference, name) for name in names} | replaced)


def test_other_heads_than_the_statistics_are_seen():
    by_means = wrong(route_heads_by_signs=reference.route_heads)
    checks = compared(Case("prefill", 8, 500, 1, 70), by_means, statistic="mean_positive")
    assert "heads has 0." in indexers.disagreement(checks)


def test_wrong_selection_is_seen():
    def off_by_one(q, gates, heads, index_cache, rows, k, out, *bounds):
        reference.select_tokens(q, gates, heads, index_cache, rows, k, out, *bounds)
        out.add_(1)

    checks = compared(Case("prefill", 8, 500, 1, 70), wrong(select_tokens=off_by_one))
    assert "select has 0." in indexers.disagreement(checks)
    assert checks["exact"] < 0.5


def test_selection_by_other_heads_is_seen():
    def other_heads(q, gates, heads, *rest):
        heads = None if heads is None else (heads + 1) % q.shape[1]
        reference.select_tokens(q, gates, heads, *rest)

    checks = compared(Case("decode", 8, 700, 3, 1), wrong(select_tokens=other_heads))
    assert "select has 0." in indexers.disagreement(checks)


def test_wrong_heads_are_seen():
    def first_heads(q, gates, index_cache, rows, active_heads, pool_block):
        return torch.arange(active_heads, dtype=torch.int32).repeat(len(rows), 1)

    checks = compared(Case("prefill", 8, 500, 1, 70), wrong(route_heads=first_heads))
    assert "the reference's heads" in indexers.disagreement(checks)


def test_unsorted_candidates_left_out_are_seen():
    def first_candidates(q, gates, candidates, index_cache, rows, k, out, *bounds):
        out[:, :k] = candidates[:, :k]

    checks = compared(Case("prefill", 8, 500, 1, 70), wrong(rerank_tokens=first_candidates))
    assert "hierarchical has 0." in indexers.disagreement(checks)


def test_not_a_number_is_no_agreement():
    assert indexers.disagreement({"exact": float("nan")})


def test_equal_scores_may_change_places():
    scores = torch.tensor([[5.0, 1.0, 1.0, 0.0, 1.0]])
    theirs = torch.tensor([[0, 1]], dtype=torch.int32)
    for token, share in ((1, 1.0), (2, 1.0), (4, 1.0), (3, 0.5), (0, 0.5), (-1, 0.5), (5, 0.5), (2**30, 0.5)):
        ours = torch.tensor([[0, token]], dtype=torch.int32)
        assert indexers.shared_tokens(ours, theirs, 5, scores).item() == share
    # the best one is missing, and no number of others makes up for it
    assert indexers.shared_tokens(torch.tensor([[1, 2]]), theirs, 5, scores).item() == 0.5
    assert indexers.shared_tokens(torch.tensor([[0, 2]]), theirs, 5).item() == 0.5


def test_shared_tokens_against_sets():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (
        torch.stack([torch.randperm(40, generator=generator)[:10] for _ in range(300)]).int() for _ in range(2)
    )
    ours[:100, 5:] = -1
    theirs[50:150, 7:] = -1
    ours[200, :] = ours[200, 0]  # a token named twice counts once
    share = indexers.shared_tokens(ours, theirs, 40)
    for m in range(300):
        mine, other = ({token for token in row.tolist() if token >= 0} for row in (ours[m], theirs[m]))
        assert share[m].item() == pytest.approx(len(mine & other) / len(other))


def test_paper_selects_what_the_reference_selects():
    """Within bf16: keys have 3 mantissa bits and are exact, products and block means are rounded to 8 bits."""
    case, given = Case("prefill", 8, 500, 1, 150), options()
    pool = KeyPool(10, torch.device("cpu"))
    inputs = [make_inputs(case, pool, number, case.keys) for number in range(2)]
    for number, one in enumerate(inputs):
        keys = reference.read_index_keys(one.index_cache, one.rows.block_table[0], case.keys)
        wanted = reference.misa(one.q, one.gates, keys, one.rows.visible, given.k, given.active_heads, given.pool_block)
        share = indexers.shared_tokens(PaperIndexer(case, inputs, given).whole(number), wanted, case.keys)
        assert share.median() >= 0.95


# ---------------------------------------------------------------- a whole run, its kernels and clock made up


@pytest.fixture
def on_cpu(monkeypatch):
    """`misa-bench kernels` with torch in the place of all kernels; a call takes 100 us, stock's 300."""

    def time_in_turn(passes, calls, repeats, device, use_graphs):
        return {name: Timing(300.0 if name[0] == "stock" else 100.0, 400.0, repeats) for name in passes}

    monkeypatch.setattr(indexers, "available_kernels", lambda names, device: ({"triton": reference}, ["cuda: none"]))
    monkeypatch.setattr("misa_vllm.seam.stock_kernels.stock_indexer_kernels", lambda device: DenseStock())
    monkeypatch.setattr(timing, "time_in_turn", time_in_turn)
    monkeypatch.setattr(kernels, "PREFILL_CALLS", 2)
    monkeypatch.setattr(kernels, "DECODE_CALLS", range(2, 3))
    monkeypatch.setattr(timing, "l2_bytes", lambda device: MIB // 16)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(report, "environment", lambda: dict(ENVIRONMENT))
    monkeypatch.setattr(kernels, "GROWTH_KEYS", [256, 512, 1024])
    monkeypatch.setattr(kernels, "TRANSIENT_KEYS", 640)
    monkeypatch.setattr(kernels, "TRANSIENT_ROWS", 10)
    monkeypatch.setattr(indexers, "transient_bytes", lambda ours: 3 * MIB)
    monkeypatch.setattr(reference, "workspace_bytes", lambda *sizes: 4 * MIB, raising=False)


def run_on_cpu(*words):
    args = arguments("kernels", *SMALL, *words)
    return kernels.Benchmark(args, torch.device("cpu")).run(kernels.cases_of(args))


def test_whole_run(on_cpu, capsys):
    result = json.loads(json.dumps(run_on_cpu("--growth", "--paper", "--paper-rows", "64")))
    assert result["failures"] == []
    stages = {
        (row["phase"], row["implementation"], row["stage"]) for row in result["rows"] if row["keys"] in (500, 700)
    }
    ours = {"page means", "route", "select", "whole", "exact", "hierarchical"}
    stock = {"scores", "top-k", "whole"}
    assert stages == (
        {("prefill", "triton", stage) for stage in ours}
        | {("prefill", "stock", stage) for stage in stock | {"gather"}}
        | {("decode", "triton", stage) for stage in ours}
        | {("decode", "stock", stage) for stage in stock}
    )
    assert len(result["checks"]) == 2 * 2 + 2 * 2 * 2 * 2 + 2
    assert {row["speedup"] for row in result["rows"]} == {1.0, 3.0}
    assert [row["keys"] for row in result["growth"]] == [256, 512, 1024]
    assert {row["implementation"] for row in result["paper"]} == {"stock", "triton", "paper in torch"}
    text = kernels.as_text(result)
    assert text.splitlines()[0] == (
        "NVIDIA Test, driver 1.2, cuda 13.0, torch 2.13.0, triton 3.7, vllm 0.32.0, misa_vllm 0.1.0, "
        "commit abc1234, 2026-01-02T03:04:05+00:00"
    )
    assert "cuda: none" in text
    assert "decode, triton, whole: 3.00x over stock (geometric mean of 16; least 3.00x)" in text
    assert "transient memory, 10 rows x 640 keys, triton: 3.0 MiB, 4.0 MiB counted in vLLM's profile" in text
    assert "top-k (dense)" in text and "top-k (per_row)" in text
    capsys.readouterr()


def test_failed_case_leaves_the_others(on_cpu, monkeypatch, capsys):
    def fails_at_500(q, gates, heads, index_cache, rows, *rest):
        if rows.max_visible == 500:
            raise RuntimeError("no such luck\nand more")
        reference.select_tokens(q, gates, heads, index_cache, rows, *rest)

    monkeypatch.setattr(
        indexers, "available_kernels", lambda *_: ({"triton": wrong(select_tokens=fails_at_500), "cuda": reference}, [])
    )
    result = run_on_cpu("--phases", "prefill")
    assert result["failures"] == [
        f"prefill, H = {heads}, 70 rows, 500 keys, triton: RuntimeError: no such luck" for heads in (8, 4)
    ]
    timed = {(row["implementation"], row["keys"]) for row in result["rows"]}
    assert timed == {("stock", 300), ("stock", 500), ("triton", 300), ("cuda", 300), ("cuda", 500)}
    capsys.readouterr()


def test_cases_after_the_budget_are_left_out(on_cpu, monkeypatch, capsys):
    monkeypatch.setattr(indexers, "available_kernels", lambda *_: ({"cuda": reference}, []))
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(kernels, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    result = run_on_cpu("--phases", "prefill", "--budget", "250")
    assert {row["keys"] for row in result["rows"]} == {300} and not result["failures"]
    assert result["left_out"][0] == "left out, --budget 250 was spent: prefill, H = 8, 70 rows, 500 keys"
    capsys.readouterr()


def test_scores_of_any_size_agree(on_cpu, monkeypatch, capsys):
    monkeypatch.setattr(indexers, "available_kernels", lambda *_: ({"cuda": reference}, []))
    assert not run_on_cpu("--phases", "prefill", "--gate-scale", "1e-15")["failures"]
    capsys.readouterr()


def test_disagreement_is_reported_and_not_timed(on_cpu, monkeypatch, capsys, tmp_path):
    def newest(q, gates, heads, index_cache, rows, k, out, *bounds):
        out[:, :k] = rows.visible.unsqueeze(1) - 1 - torch.arange(k)

    monkeypatch.setattr(indexers, "available_kernels", lambda *_: ({"triton": wrong(select_tokens=newest)}, []))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    benchmark = kernels.Benchmark
    monkeypatch.setattr(kernels, "Benchmark", lambda args, device: benchmark(args, torch.device("cpu")))
    file = tmp_path / "folder" / "out.json"
    assert cli.main(["kernels", *SMALL, "--phases", "prefill", "--json", str(file)]) == 1
    result = json.loads(file.read_text())
    assert len(result["failures"]) == 4 and "not timed" in result["failures"][0]
    assert {row["implementation"] for row in result["rows"]} == {"stock"}
    captured = capsys.readouterr()
    assert captured.err.count("misa-bench: failed: ") == 4
    assert list(tmp_path.rglob("*.json")) == [file]


def test_no_kernels_of_ours(on_cpu, monkeypatch):
    monkeypatch.setattr(indexers, "available_kernels", lambda *_: ({}, ["cuda kernels left out: why", "triton: so"]))
    with pytest.raises(BenchmarkError, match="cuda kernels left out: why; triton: so"):
        run_on_cpu()


# ---------------------------------------------------------------- output


def test_table_is_aligned():
    text = report.aligned_table(["name", "us"], [["a", "1000.0"], ["longer", "2.5"]], left=1)
    assert text == "name        us\na       1000.0\nlonger     2.5"


def row(**changes):
    base = {"phase": "prefill", "heads": 64, "requests": 1, "rows_each": 2048, "keys": 131072}
    base |= {"implementation": "cuda", "stage": "whole", "median_us": 850.0, "p90_us": 900.0, "runs": 11}
    return base | {"tflops": 640.4, "tb_per_s": 0.02, "speedup": 6.0588} | changes


def test_table_of_kernels():
    rows = [
        row(implementation="stock", stage="scores", median_us=4463.0, speedup=1.15),
        row(),
        row(phase="decode", requests=8, rows_each=2, tb_per_s=3.456, speedup=1.5),
        row(stage="page means", tflops=0.0, tb_per_s=1.0),
    ]
    cells = [kernels._cells(one) for one in rows]
    assert cells[0] == ["prefill", "64", "2048", "131072", "stock", "scores", "4463.0", "900.0", "640", "", ""]
    assert cells[1][6:] == ["850.0", "900.0", "640", "", "6.06x"]
    assert cells[2][2] == "8 x 2" and cells[2][8:] == ["", "3.46", "1.50x"]
    assert cells[3][8:10] == ["", "1.00"]


def test_geometric_mean():
    lines = kernels._means([row(speedup=2.0), row(speedup=8.0), row(implementation="stock", speedup=1.0)])
    assert lines == ["prefill, cuda, whole: 4.00x over stock (geometric mean of 2; least 2.00x)"]


@pytest.mark.parametrize("exponent", [1.0, 0.5, 1.3])
def test_growth_slope(exponent):
    rows = [{"flop": 10**i, "median_us": 7 * (10**i) ** exponent} for i in range(3, 8)]
    assert kernels.growth_slope(rows) == pytest.approx(exponent)


def test_curves_ascend_and_leave_stock_out():
    rows = [row(keys=200, speedup=2.0), row(keys=100, speedup=1.0), row(implementation="stock"), row(stage="route")]
    rows += [row(phase="decode", rows_each=n, requests=8, keys=100, speedup=3.0) for n in (1, 2)]
    assert curves(rows, "prefill") == {("cuda, H = 64", "whole"): [(100, 1.0), (200, 2.0)]}
    assert curves(rows, "decode") == {("cuda, H = 64, batch 8", "whole"): [(100, 3.0)]}


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("rows", [[], [row(), row(phase="decode", rows_each=1)]])
def test_plot(tmp_path, suffix, rows):
    pytest.importorskip("matplotlib")
    from misa_vllm.bench.plot import plot

    growth = [row(keys=keys, median_us=float(keys), flop=keys) for keys in (8192, 16384)] if rows else []
    plot({"rows": rows, "growth": growth, "environment": ENVIRONMENT}, tmp_path / f"out{suffix}")
    assert (tmp_path / f"out{suffix}").stat().st_size > 1000


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "deep" / "out.txt"
    report.write_text(file, "first")
    with pytest.raises(ZeroDivisionError), report.replacing(file) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert file.read_text() == "first"
    assert list(file.parent.iterdir()) == [file]
    report.write_text(file, "second")
    assert file.read_text() == "second"
    assert list(file.parent.iterdir()) == [file]


# ---------------------------------------------------------------- engines


def engine(**changes):
    sizes = {"contexts": [1000, 3000], "decode_contexts": [2000], "batches": [1, 4], "repeats": 3}
    return serve_shapes.Engine(**{"shape": "glm-5", "policy": "misa", "kernels": "auto"} | sizes | changes)


def test_engines_in_turn():
    words = ["--policies", "misa", "dsa", "--kernels", "cuda", "triton", "--options", '{"pool_block": 128}']
    engines = serve_shapes.engines_of(arguments("serve-shapes", *words))
    names = ["stock", "misa (cuda)", "misa (triton)", "dsa (cuda)", "dsa (triton)"]
    assert [(one.shape, one.name) for one in engines] == [
        (shape, name) for shape in ("deepseek-v3.2", "glm-5") for name in names
    ]
    assert "attention_backend" not in engines[0].llm_arguments("model")
    assert engines[1].llm_arguments("model")["additional_config"] == {"misa": {"policy": "misa", "pool_block": 128}}
    assert [one.environment().get("MISA_KERNELS") for one in engines[1:3]] == ["cuda", "triton"]
    assert engines[0].llm_arguments("model")["max_num_seqs"] == 32


def test_engine_holds_the_longest_request():
    assert engine().max_model_len >= 3001
    assert engine(contexts=[]).max_model_len >= 2000 + 66
    assert engine(decode_contexts=[], batches=[]).max_model_len % 64 == 0
    assert engine(contexts=[], profile=True).max_model_len >= 2000 + decode_profile.TOKENS


def test_profiling_needs_one_process():
    with pytest.raises(BenchmarkError, match="leave out --tensor-parallel-size"):
        serve_shapes.engines_of(arguments("serve-shapes", "--profile", "--tensor-parallel-size", "2"))
    assert all(one.profile for one in serve_shapes.engines_of(arguments("serve-shapes", "--profile")))


def test_nothing_to_serve():
    with pytest.raises(BenchmarkError, match="nothing to time"):
        serve_shapes.engines_of(arguments("serve-shapes", "--contexts", "--batches"))


@pytest.mark.parametrize(("shape", "index_heads"), [("deepseek-v3.2", 64), ("glm-5", 32)])
def test_shapes_have_an_indexer(shape, index_heads):
    settings = resolve_settings({}, argparse.Namespace(**serve_shapes.SHAPES[shape]))
    assert (settings.index_heads, settings.topk) == (index_heads, 2048)
    assert serve_shapes.SHAPES[shape]["first_k_dense_replace"] == serve_shapes.SHAPES[shape]["num_hidden_layers"] == 4


class FakeLLM:
    """An engine whose prefill takes 1 ms per token that is not in the cache and whose decode takes 2 ms per step."""

    now = 0.0
    made = []

    def __init__(self, **arguments):
        self.arguments, self.cached = arguments, set()
        FakeLLM.made.append(self)

    def reset_prefix_cache(self):
        self.cached.clear()

    def collective_rpc(self, method):
        assert not self.cached and hasattr(serve_shapes.OrdinaryWeights, method)
        assert self.arguments["worker_extension_cls"] == "misa_vllm.bench.serve_shapes.OrdinaryWeights"

    def generate(self, prompts, sampling, use_tqdm):
        assert len(prompts) <= self.arguments["max_num_seqs"]
        for one in prompts:
            tokens = tuple(one["prompt_token_ids"])
            assert len(tokens) + sampling.max_tokens <= self.arguments["max_model_len"]
            FakeLLM.now += 0.0 if tokens in self.cached else len(tokens) * 1e-3
            self.cached.add(tokens)
        FakeLLM.now += 2e-3 * sampling.max_tokens
        output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * sampling.max_tokens)])
        return [output] * len(prompts)


@pytest.mark.parametrize("policy", [None, "misa"])
def test_measuring_an_engine(policy, monkeypatch, tmp_path):
    vllm = SimpleNamespace(LLM=FakeLLM, SamplingParams=lambda **given: SimpleNamespace(**given))
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr("misa_vllm.plugin.register", lambda: None)
    monkeypatch.setattr("misa_vllm.kernels.choose_kernels", lambda device: reference)
    monkeypatch.setattr(report, "environment", lambda: dict(ENVIRONMENT))
    monkeypatch.setattr(serve_shapes, "time", SimpleNamespace(perf_counter=lambda: FakeLLM.now))
    one = engine(policy=policy, llm={"max_num_seqs": 4})
    (tmp_path / "engine.json").write_text(json.dumps(serve_shapes.asdict(one)))
    serve_shapes.measure_engine(tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    # every prompt is new to the cache, and only one token follows it
    assert [one["median_s"] for one in result["first_token"]] == pytest.approx([1.002, 3.002])
    assert [len(one["seconds"]) for one in result["first_token"]] == [3, 3]
    # every prompt is in the cache, and the time before the 2nd token is left out
    assert [(one["batch"], one["median_step_s"]) for one in result["decode"]] == [
        (1, pytest.approx(2e-3)),
        (4, pytest.approx(2e-3)),
    ]
    assert result["kernels"] == (None if policy is None else "reference")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["max_position_embeddings"] == FakeLLM.made[-1].arguments["max_model_len"]


class FakeSteps:
    """vLLM's engine, one token a step for every request; a step calls torch."""

    def __init__(self, **_):
        self.tokens, self.most = {}, {}

    def add_request(self, name, prompt, sampling):
        self.tokens[name], self.most[name] = [], sampling.max_tokens

    def step(self):
        torch.ones(8).sum()
        for tokens in self.tokens.values():
            tokens.append(0)
        return [
            SimpleNamespace(
                request_id=name,
                outputs=[SimpleNamespace(token_ids=tokens)],
                finished=len(tokens) >= self.most[name],
            )
            for name, tokens in self.tokens.items()
        ]

    def abort_request(self, names):
        for name in names:
            del self.tokens[name]

    def has_unfinished_requests(self):
        return bool(self.tokens)


def test_profile_of_decode_steps():
    engine = FakeSteps()
    sampling = SimpleNamespace(max_tokens=decode_profile.TOKENS)
    profile = decode_profile.profile_decode(engine, [{}, {}], sampling)
    assert profile["batch"] == 2 and not engine.has_unfinished_requests()
    assert profile["wall_ms"]["least"] <= profile["wall_ms"]["median"] <= profile["wall_ms"]["most"]
    if not torch.cuda.is_available():
        assert (profile["kernels"], profile["gpu_busy_ms"], profile["top"]) == (0, 0, [])
    with pytest.raises(RuntimeError, match="ended after 20 tokens"):
        decode_profile.profile_decode(FakeSteps(), [{}], SimpleNamespace(max_tokens=20))


def test_summary_of_a_profile():
    event = decode_profile.Event
    events = [
        event("cudaGraphLaunch", 0.0, 5.0, False),
        event("void misa::a<8>(int*)", 10.0, 4.0, True),
        event("Memset (Device)", 12.0, 6.0, True),  # begins before the kernel ends
        event("cudaEventSynchronize", 20.0, 100.0, False),
        event("void misa::a<8>(int*)", 30.0, 4.0, True),
    ]
    found = decode_profile.summary(events, steps=2)
    assert found["gpu_busy_ms"] == pytest.approx(12e-3 / 2)
    assert found["kernels"] == 1
    assert found["calls"]["cudaEventSynchronize"] == {"count": 0.5, "us": 50}
    assert found["top"][0] == {"name": "misa::a<8>", "us": 4, "count": 1}
    wall = dict.fromkeys(("median", "p90", "least", "most"), 1.0)
    lines = decode_profile.as_text({"batch": 1, "wall_ms": wall, **found})
    assert "busy 0.006 ms with 1.0 kernels" in lines[0] and "cudaGraphLaunch 0.5" in lines[1]


def test_drawn_weights_keep_the_size_of_activations():
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.LayerNorm(512), torch.nn.Embedding(8, 512))
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -1e-3, 1e-3)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    serve_shapes.draw_weights(model)
    assert model[0](torch.randn(64, 512)).std().item() == pytest.approx(1, rel=0.1)
    assert model[1].weight.unique().tolist() == [1] and model[1].bias.unique().tolist() == [0]
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


def stand_in_for_python(monkeypatch, tmp_path, body):
    """Let the engine's process run `body` instead, with the folder in $4."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def test_engine_process(monkeypatch, tmp_path):
    body = 'echo started; test -f "$4/engine.json" && echo \'{"a": 1}\' > "$4/result.json"'
    stand_in_for_python(monkeypatch, tmp_path, body)
    assert serve_shapes.run_engine(engine(), 60, tmp_path / "logs") == ({"a": 1}, None)
    assert (tmp_path / "logs" / "glm-5-misa.log").read_text() == "started\n"


def test_engine_process_that_fails(monkeypatch, tmp_path, capsys):
    stand_in_for_python(monkeypatch, tmp_path, "seq 100; exit 3")
    assert serve_shapes.run_engine(engine(), 60, None) == (None, "its process ended with code 3")
    assert capsys.readouterr().err.split() == [str(i) for i in range(81, 101)]


def test_engine_process_that_hangs_is_ended_with_its_children(monkeypatch, tmp_path, capsys):
    pid_file = tmp_path / "pid"
    stand_in_for_python(monkeypatch, tmp_path, f"sleep 600 & echo $! > {pid_file}; wait")
    measured, problem = serve_shapes.run_engine(engine(), 0.5, None)
    assert measured is None and "more than 0.5 s: raise --timeout" in problem
    pid = int(pid_file.read_text())
    for _ in range(100):
        try:
            state = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            break
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        os.kill(pid, 9)
        pytest.fail("the engine's child process lives on")
    capsys.readouterr()


def measured(engine_name, first, step):
    return {
        "shape": "glm-5",
        "engine": engine_name,
        "kernels": None if engine_name == "stock" else "triton",
        "first_token": [{"context": 1000, "seconds": [first, first * 2], "median_s": first}],
        "decode": [{"context": 2000, "batch": 8, "step_s": [step], "median_step_s": step}],
    }


def test_table_of_engines():
    rows = serve_shapes.rows_of([measured("stock", 2.0, 0.010), measured("misa", 1.0, 0.008)])
    assert [(one["measure"], one["engine"], one["speedup"]) for one in rows] == [
        ("first token", "stock", 1.0),
        ("first token", "misa", 2.0),
        ("decode", "stock", 1.0),
        ("decode", "misa", pytest.approx(1.25)),
    ]
    assert rows[3]["tokens_per_s"] == pytest.approx(1000)
    args = report.plain(vars(arguments("serve-shapes")))
    text = serve_shapes.as_text({"rows": rows, "arguments": args, "environment": ENVIRONMENT})
    lines = text.splitlines()
    assert lines[-1].split() == "glm-5 decode 8 2000 misa 8.000 ms 8.000 ms 8.000 ms 1000 1.25x".split()
    assert lines[-3].split() == "glm-5 first token 1 1000 misa 1.000 s 1.000 s 2.000 s 2.00x".split()


def test_ratio_needs_the_stock_engine():
    rows = serve_shapes.rows_of([measured("misa", 1.0, 0.008)])
    assert {one["speedup"] for one in rows} == {None}


def test_failed_engine_leaves_the_others(monkeypatch, tmp_path, capsys):
    def run_engine(one, timeout, logs):
        if one.shape == "glm-5" and one.policy:
            return None, "its process ended with code 1"
        return measured(one.name, 1.0, 0.01) | {"environment": ENVIRONMENT}, None

    monkeypatch.setattr(report, "require_gpu", lambda: None)
    monkeypatch.setattr(serve_shapes, "run_engine", run_engine)
    file = tmp_path / "out.json"
    assert cli.main(["serve-shapes", "--json", str(file)]) == 1
    result = json.loads(file.read_text())
    assert result["failures"] == ["glm-5, misa: its process ended with code 1"]
    assert len(result["engines"]) == 3
    assert result["environment"] == ENVIRONMENT
    assert "misa-bench: failed: glm-5, misa" in capsys.readouterr().err


def test_engines_after_the_budget_are_left_out(monkeypatch, tmp_path, capsys):
    clock, given = [0.0], []
    file = tmp_path / "out.json"

    def run_engine(one, timeout, logs):
        given.append(timeout)
        clock[0] += 50
        if len(given) == 2:  # what the first engine gave is on disk
            assert len(json.loads(file.read_text())["rows"]) == 2
        return measured(one.name, 1.0, 0.01) | {"environment": ENVIRONMENT}, None

    monkeypatch.setattr(report, "require_gpu", lambda: None)
    monkeypatch.setattr(serve_shapes, "run_engine", run_engine)
    monkeypatch.setattr(serve_shapes, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert cli.main(["serve-shapes", "--json", str(file), "--budget", "110", "--timeout", "70"]) == 1
    assert given == [70, 60]
    result = json.loads(file.read_text())
    assert len(result["engines"]) == 2
    assert result["failures"] == [f"glm-5, {name}: not started, --budget 110 is spent" for name in ("stock", "misa")]
    capsys.readouterr()
