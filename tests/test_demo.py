"""The demo's parts that need no model: its command line, its reading of the metrics."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from misa_vllm import demo
from misa_vllm.demo import Answer, Counters, DemoError


def test_command_line_audits_and_passes_options_on():
    command = demo.server_command("m", 1234, {"policy": "dsa"}, ["--dtype", "float32"])
    config = json.loads(command[command.index("--additional-config") + 1])
    assert config == {"misa": {"audit_every": demo.AUDIT_EVERY, "policy": "dsa"}}
    assert command[-2:] == ["--dtype", "float32"] and command[command.index("--port") + 1] == "1234"


@pytest.mark.parametrize("options", ["{", "[1]", "7"])
def test_options_that_are_no_object_get_one_line(options, capsys):
    with pytest.raises(SystemExit):
        demo.main(["model", "--options", options])
    assert "not" in capsys.readouterr().err.splitlines()[-1]


EXPOSITION = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running 1.0
# TYPE misa:queries counter
misa:queries_total{{path="all"}} {all}
misa:queries_total{{path="exact"}} {exact}
misa:queries_total{{path="routed"}} {routed}
# TYPE misa:audited_queries counter
misa:audited_queries_total {audited}
# TYPE misa:audited_recall_sum counter
misa:audited_recall_sum_total {recall}
# TYPE misa:config info
misa:config_info{{policy="misa",active_heads="8",index_heads="64",pool_block="1024"}} 1.0
"""


def test_figures_are_those_of_the_request_alone():
    before = demo.parse_counters(EXPOSITION.format(all=1, exact=1, routed=100, audited=10, recall=1))
    after = demo.parse_counters(EXPOSITION.format(all=11, exact=21, routed=170, audited=14, recall=4.5))
    counted = after.since(before)
    assert counted.queries == {"all": 10, "exact": 20, "routed": 70}
    assert counted.recall == 3.5 / 4
    text = demo.report(Answer(prompt_tokens=100, tokens=11, first_token_s=2.0, total_s=4.0), counted)
    assert "8 of 64 for 70.0% of the queries" in text
    assert "87.5% (mean of 4 sampled queries)" in text
    assert "11 tokens, 5.0 tokens/s" in text and "50 prompt tokens/s" in text


def test_no_sample_is_no_recall():
    assert Counters({}, {}, 0.0, 0.0).recall is None


def test_a_server_without_misa_is_told():
    with pytest.raises(DemoError, match="--attention-backend misa"):
        demo.parse_counters("# TYPE x gauge\nx 1\n")


def test_a_hidden_sentence_stands_between_two_others():
    document = "One is first. Two follows!\n\nThree ends."
    assert demo.hidden_in(document, "Here it is.", 0.0) == f" Here it is.{document}"
    assert demo.hidden_in(document, "Here it is.", 0.4) == "One is first. Here it is. Two follows!\n\nThree ends."
    assert demo.hidden_in(document, "Here it is.", 1.0) == f"{document} Here it is."


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("model", "needle"), [(".models/tiny", False), (".models/trained", True), ("else", False)])
def test_make_asks_the_trained_model_for_a_needle(model, needle):
    root = Path(demo.__file__).resolve().parent.parent
    run = subprocess.run(["make", "-n", "demo", f"MODEL={model}"], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0 and ("--needle" in run.stdout) == needle
    assert ("misa_vllm.models.trained" in run.stdout) == needle or Path(root / ".models/trained").exists()
