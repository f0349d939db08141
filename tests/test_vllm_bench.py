"""`misa-bench vllm`: what it starts, what it makes of the results, and one model through all of it."""

import json
import sys

import pytest

from misa_vllm import processes
from misa_vllm.bench import cli, vllm_bench
from misa_vllm.models import tiny

DRAWN_BY_LATENCY = 10_000
MACHINE = {"date": "2026-01-02T03:04:05+00:00", "hardware": "NVIDIA Test", "vllm": "0.32.0"}


def arguments(*words):
    return cli.parser("vllm").parse_args(["vllm", "MODEL", "--output", "FOLDER", *words])


def test_engines_differ_in_what_selects_alone():
    assert arguments("--vllm=--enforce-eager").vllm == ["--enforce-eager"]
    args = arguments("--vllm=--tensor-parallel-size 8", "--options", '{"pool_block": 64}')
    stock, misa = (vllm_bench.engine_arguments(engine, args) for engine in ("stock", "misa"))
    assert stock == ["--no-enable-prefix-caching", "--tensor-parallel-size", "8"]
    assert misa[:2] == ["--attention-backend", "misa"] and misa[-3:] == stock
    assert json.loads(misa[3]) == {"misa": {"policy": "misa", "pool_block": 64}}


def test_clients_get_the_tokenizers_options():
    options = ["--dtype", "float32", "--tokenizer-mode", "hf", "--tokenizer=T"]
    assert vllm_bench.tokenizer_arguments(options) == ["--tokenizer=T", "--tokenizer-mode", "hf"]


@pytest.mark.parametrize("words", [["--tools", "speed"], ["--engines", "vllm"], ["--options", "[]"]])
def test_wrong_words_get_one_line(words, capsys):
    with pytest.raises(SystemExit):
        arguments(*words)
    assert "invalid" in capsys.readouterr().err.splitlines()[-1]


def test_ratios_and_table():
    figures = [
        {"tool": "latency", "engine": "stock", "avg_latency": 3.0},
        {"tool": "latency", "engine": "misa", "avg_latency": 2.0},
        {"tool": "throughput", "engine": "stock", "tokens_per_second": 100.0, "requests_per_second": 1.0},
        {"tool": "throughput", "engine": "misa", "tokens_per_second": 150.0, "requests_per_second": 1.5},
    ]
    ratios = vllm_bench.speedups(figures, "stock")
    assert ratios["latency", "misa", "avg_latency"] == ratios["throughput", "misa", "tokens_per_second"] == 1.5
    result = {"figures": figures, "arguments": vars(arguments()), "environment": MACHINE}
    lines = vllm_bench.as_text(result).splitlines()
    assert lines[0].startswith("NVIDIA Test")
    assert lines[-1].split() == ["throughput", "requests/s", "misa", "1.5", "1.50x"]
    assert {tool for tool, _, _ in vllm_bench.speedups(figures[1:], "stock")} == {"throughput"}


def test_engine_that_fails_is_told_and_leaves_the_others(monkeypatch, tmp_path, capsys):
    def run(command, timeout, stdout, stderr, env):
        if "--attention-backend" in command:
            stderr.write(b"because of this\n")
            return "its process ended with code 1"
        (tmp_path / "out" / "latency_stock.json").write_text('{"avg_latency": 2.0}')

    monkeypatch.setattr(processes, "run", run)
    assert cli.main(["vllm", "MODEL", "--output", str(tmp_path / "out"), "--tools", "latency"]) == 1
    printed = capsys.readouterr()
    assert "because of this" in printed.err and "failed: latency, misa: its process ended with code 1" in printed.err
    assert "stock" in printed.out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["figures"] == [{"tool": "latency", "engine": "stock", "avg_latency": 2.0}]
    assert summary["failures"] == ["latency, misa: its process ended with code 1"]


def test_a_figure_that_is_missing_is_told(monkeypatch, tmp_path, capsys):
    results = tmp_path / "latency_stock.json"
    monkeypatch.setattr(processes, "run", lambda *_: results.write_text("{}") and None)
    command = ["vllm", "MODEL", "--output", str(tmp_path), "--tools", "latency", "--engines", "stock"]
    assert cli.main(command) == 2
    assert f"{results} lacks avg_latency" in capsys.readouterr().err


def test_no_figure_is_an_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(processes, "run", lambda *_: None)
    assert cli.main(["vllm", "MODEL", "--output", str(tmp_path), "--tools", "latency"]) == 2
    assert "no engine was measured: latency, stock: it wrote no latency_stock.json" in capsys.readouterr().err


def test_a_model_through_server_and_engine(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    tiny.write_model(tmp_path / "model", tiny.TinySize(topk=64, embedding_rows=DRAWN_BY_LATENCY))
    sizes = ["--input-len", "300", "--output-len", "4", "--num-prompts", "2", "--num-iters", "1"]
    given = ["--tools", "serve", "latency", "--engines", "misa", "--options", '{"pool_block": 64}', *sizes]
    command = ["vllm", str(tmp_path / "model"), "--output", str(tmp_path / "out"), *given]
    monkeypatch.setattr(sys, "argv", ["misa-bench", *command])
    code = cli.main([*command, "--vllm=--tokenizer-mode hf --max-model-len 2048", "--timeout", "240"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [set(one) - {"tool", "engine"} for one in summary["figures"]] == [
        set(vllm_bench.FIGURES["serve"]), set(vllm_bench.FIGURES["latency"])
    ]  # fmt: skip
    assert summary["command"].startswith("misa-bench vllm")
    assert "Serving Benchmark Result" in (tmp_path / "out" / "serve_misa.txt").read_text()
    assert "Avg latency" in (tmp_path / "out" / "latency_misa.txt").read_text()
    assert "MISA" in (tmp_path / "out" / "server_misa.log").read_text()
