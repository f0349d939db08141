"""The OpenAI server over HTTP: concurrent and aborted requests, bad requests, metrics, and no page lost."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from misa_vllm.models import tiny

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this test runs the CPU engine")

MAX_LEN = 8192
# One client for all calls: a new one reads certificates first, for seconds while the engine keeps all cores busy.
CLIENT = httpx.Client(timeout=120)
VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "model"
    tiny.write_model(folder, tiny.TinySize(topk=64))
    return str(folder)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """(base URL) of a server of two processes under policy misa, every routed query audited."""
    port = free_port()
    log = tmp_path_factory.mktemp("log") / "server.log"
    options = {"misa": {"pool_block": 64, "audit_every": 1}}
    command = [
        *VLLM, model, "--attention-backend", "misa", "--additional-config", json.dumps(options), "--port", str(port),
        "--tokenizer-mode", "hf", "--max-model-len", str(MAX_LEN), "--max-num-batched-tokens", "256",
        "--served-model-name", "tiny", "--host", "127.0.0.1",
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with open(log, "w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                if CLIENT.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=30)
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def metric(server: str, name: str, labels: str = "") -> float:
    text = CLIENT.get(f"{server}/metrics").text
    values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*{labels}[^}}]*\}})? (\S+)$", text, re.MULTILINE)
    assert values, f"{name} is not on /metrics"
    return sum(map(float, values))


def wait_until(condition, message: str) -> None:
    """vLLM sets its gauges after it has answered, so what they tell may be a step old."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.1)


def wait_until_idle(server: str) -> None:
    gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    wait_until(lambda: not any(metric(server, gauge) for gauge in gauges), "requests are still running")


def complete(server: str, **fields):
    body = {"model": "tiny", "temperature": 0, "max_tokens": 8, "ignore_eos": True, **fields}
    return CLIENT.post(f"{server}/v1/completions", json=body)


PROMPTS = [" ".join(f"article {i} section {i * j}" for i in range(60)) for j in range(1, 7)]


def test_concurrent_requests_answer_as_alone(server):
    alone = [complete(server, prompt=prompt).json()["choices"][0]["text"] for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        together = list(pool.map(lambda prompt: complete(server, prompt=prompt), PROMPTS))
    assert [answer.status_code for answer in together] == [200] * len(PROMPTS)
    # a row's products round differently in a batch, which may turn a near tie: lengths and words are checked
    assert all(answer.json()["usage"]["completion_tokens"] == 8 for answer in together)
    same = sum(answer.json()["choices"][0]["text"] == text for answer, text in zip(together, alone, strict=True))
    assert same >= len(PROMPTS) // 2


def test_chat_streams(server):
    body = {
        "model": "tiny", "messages": [{"role": "user", "content": PROMPTS[0]}], "max_tokens": 5, "stream": True,
        "ignore_eos": True,
    }  # fmt: skip
    with CLIENT.stream("POST", f"{server}/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        events = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert len(events) > 5


def test_request_with_a_seed_longer_than_a_chunk(server):
    first = complete(server, prompt=PROMPTS[0], temperature=1, seed=5)
    assert first.status_code == 200
    assert CLIENT.get(f"{server}/health").status_code == 200


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (json.dumps({"model": "tiny", "prompt": "word " * 4 * MAX_LEN}), 400),
        (json.dumps({"model": "tiny", "prompt": ""}), 400),
        (json.dumps({"model": "tiny", "prompt": [], "max_tokens": 1}), 400),
        ('{"model": "tiny", "prompt": ', 400),
        (json.dumps({"model": "another", "prompt": "hello"}), 404),
    ],
    ids=["too long", "empty", "no tokens", "invalid JSON", "unknown model"],
)
def test_bad_request_gets_vllms_error_and_the_server_goes_on(server, content, expected):
    answer = CLIENT.post(f"{server}/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == expected, answer.text
    assert "error" in answer.json()
    assert complete(server, prompt="hello").status_code == 200


def test_aborted_streams_return_their_pages(server):
    usage, generated = "vllm:kv_cache_usage_perc", "vllm:generation_tokens_total"
    streams, tokens = 4, MAX_LEN // 2
    wait_until_idle(server)
    before, generated_before = metric(server, usage), metric(server, generated)
    body = {"model": "tiny", "prompt": PROMPTS[3], "max_tokens": tokens, "stream": True, "ignore_eos": True}
    for _ in range(streams):
        with CLIENT.stream("POST", f"{server}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            for _ in range(6):
                next(lines)
            wait_until(lambda: metric(server, usage) > before, "the open stream holds no page")
    wait_until_idle(server)
    wait_until(lambda: metric(server, usage) == before, "the aborted streams kept pages")
    assert metric(server, generated) - generated_before < streams * tokens, "no stream ended early"


def test_metrics_tell_what_the_indexer_did(server):
    audited, recall = (metric(server, f"misa:audited_{name}_total") for name in ("queries", "recall_sum"))
    routed = metric(server, "misa:queries_total", 'path="routed"')
    assert complete(server, prompt="a new prompt " + PROMPTS[4]).status_code == 200
    assert metric(server, "misa:queries_total", 'path="routed"') > routed
    more = metric(server, "misa:audited_queries_total") - audited
    assert more > 0
    assert 0 < (metric(server, "misa:audited_recall_sum_total") - recall) / more <= 1
    assert metric(server, "misa:config_info", 'policy="misa"') == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--additional-config", '{"misa": {"pool_blok": 64}}'], "pool_blok"),
        (["--additional-config", '{"misa": {"active_heads": 65}}'], "choose 1 to 64"),
        (["--block-size", "32"], "--block-size 32"),
        (["--dtype", "float16"], "use bfloat16 or float32"),
    ],
)
def test_bad_options_stop_start_up_with_one_line(model, arguments, named):
    command = [*VLLM, model, "--attention-backend", "misa", "--max-model-len", "1024", *arguments]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("misa: error: ") and named in last
    assert "Traceback" not in result.stderr
