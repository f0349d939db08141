"""Needle in a haystack: prompts to the token, scores and intervals, a server's answers, engines in processes."""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import NormalDist

import numpy as np
import pytest
import torch

from misa_vllm.eval import cli, engines, niah
from misa_vllm.eval.haystack import Haystack, PromptBuilder, split_sentences
from misa_vllm.eval.needles import Needle
from misa_vllm.eval.report import EvalError, can_draw
from misa_vllm.models import tiny
from tests.test_processes import gone

DOCUMENTS = [
    tiny.TRAINING_TEXT.read_text(encoding="utf-8")[:9000],
    'He asked: "Is it far?" Nobody knew. ' * 20 + "\n\n" + "one two three four " * 400,
    "一个句子。又一个句子！",
]
NEEDLE = Needle("amber falcon", "402517")
ENVIRONMENT = {"hardware": "a test", "vllm": "0.32.0", "torch": "2.13.0", "misa_vllm": "0.1.0", "commit": "abc1234"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model, with weights."""
    folder = tmp_path_factory.mktemp("niah") / "model"
    tiny.write_model(folder, tiny.TinySize(topk=64, vocab=600, max_position=4096))
    return folder


@pytest.fixture(scope="module")
def tokenizer(model):
    return engines.load_tokenizer(str(model))


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return Haystack(DOCUMENTS, tokenizer)


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("text", DOCUMENTS)
def test_sentences_join_to_the_text(text):
    sentences = split_sentences(text)
    assert "".join(sentences) == text
    assert max(map(len, sentences)) <= 400
    assert len(sentences) > 1


def test_long_sentences_end_at_a_clause_or_a_word_or_anywhere():
    clause, words, letters = "all men, " * 60 + "x." + "y" * 300, "word " * 100, "z" * 900
    assert split_sentences(clause)[0] == ("all men, " * 60)[:395].rstrip()
    assert split_sentences(words) == [words[:399], words[399:]]
    assert [len(part) for part in split_sentences(letters)] == [400, 400, 100]


def test_where_sentences_end():
    text = 'It is 3.5 m long. "Why?" he asked (twice!) and left.\nA heading\n\nNext: e.g.this'
    assert split_sentences(text) == [
        "It is 3.5 m long.", ' "Why?"', " he asked (twice!)", " and left.", "\nA heading", "\n\nNext: e.g.this",
    ]  # fmt: skip


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("depth", [0.0, 0.13, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("tokens", [97, 256, 1001, 4095, 20011])
def test_prompt_has_its_length_and_one_needle_at_its_depth(haystack, tokenizer, tokens, depth, chat):
    builder = PromptBuilder(haystack, tokenizer, chat)
    prompt = builder.build(NEEDLE, tokens, depth, "seed")
    assert len(prompt.ids) == tokens
    sentence = tokenizer.encode(" " + NEEDLE.sentence, add_special_tokens=False)
    assert prompt.ids[prompt.needle_at : prompt.needle_at + len(sentence)] == sentence
    text = tokenizer.decode(prompt.ids)
    assert text.count(NEEDLE.sentence) == 1
    assert text.endswith(f"\n\n{NEEDLE.chat_question}<|assistant|>" if chat else f"\n\n{NEEDLE.question}")
    assert text.startswith("<|begin|><|user|>") == chat
    # without the needle the text is that of any other depth: whole sentences of the documents, in order
    plain = prompt.ids[: prompt.needle_at] + prompt.ids[prompt.needle_at + len(sentence) :]
    other = builder.build(NEEDLE, tokens, 1 - depth, "seed")
    assert plain == other.ids[: other.needle_at] + other.ids[other.needle_at + len(sentence) :]
    # the needle follows a whole sentence, the nearest one
    head = builder.head
    length = tokens - builder.overhead(NEEDLE)
    assert abs(prompt.needle_at - len(head) - depth * length) < max(map(len, haystack.sentences))
    assert prompt.depth == (prompt.needle_at - len(head)) / length
    before = prompt.ids[len(head) : prompt.needle_at]
    ends = {tuple(sentence[-3:]) for sentence in haystack.sentences}
    assert not before or tuple(before[-3:]) in ends or tuple(before) in {tuple(s) for s in haystack.sentences}


def test_needle_stands_at_the_nearest_sentence_end(tokenizer):
    haystack = Haystack(["One. Two words here. Three is the longest sentence of all of these. Four."], tokenizer)
    builder = PromptBuilder(haystack, tokenizer, chat=False)
    tokens = builder.overhead(NEEDLE) + 300
    ends = np.cumsum([len(haystack.sentences[i % 4]) for i in range(600)])
    for depth in np.linspace(0, 1, 41):
        prompt = builder.build(NEEDLE, tokens, depth, "seed")
        # whichever sentence the text began with
        candidates = []
        for start in range(4):
            offset = ends[start - 1] if start else 0
            cuts = [0, *(int(end - offset) for end in ends if 0 < end - offset <= 300)]
            candidates.append(min(cuts, key=lambda cut: (abs(cut - depth * 300), cut)))
        assert prompt.needle_at in candidates


def test_a_seed_is_a_text(haystack, tokenizer):
    builder = PromptBuilder(haystack, tokenizer, chat=False)
    first = [builder.build(NEEDLE, 500, 0.5, seed) for seed in ("a", "b", "c")]
    assert first[0] == builder.build(NEEDLE, 500, 0.5, "a")
    assert len({tuple(prompt.ids) for prompt in first}) == 3


def test_special_tokens_of_the_tokenizer_come_first_and_count(haystack, model):
    from tokenizers.processors import TemplateProcessing

    tokenizer = engines.load_tokenizer(str(model))
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    assert tokenizer.encode("a")[0] == begin
    prompt = PromptBuilder(haystack, tokenizer, chat=False).build(NEEDLE, 301, 0.0, "seed")
    assert len(prompt.ids) == 301
    assert prompt.ids[0] == begin and prompt.ids.count(begin) == 1
    assert prompt.needle_at == 1


def test_no_room_for_text(haystack, tokenizer):
    builder = PromptBuilder(haystack, tokenizer, chat=False)
    least = builder.overhead(NEEDLE) + 1
    assert len(builder.build(NEEDLE, least, 0.5, "seed").ids) == least
    with pytest.raises(EvalError, match="no room"):
        builder.build(NEEDLE, least - 1, 0.5, "seed")


def test_tokenizer_without_a_chat_template(haystack, model):
    tokenizer = engines.load_tokenizer(str(model))
    tokenizer.chat_template = None
    with pytest.raises(EvalError, match="no chat template: leave out --chat"):
        PromptBuilder(haystack, tokenizer, chat=True)


def test_documents_without_text(tokenizer):
    with pytest.raises(EvalError, match="no text"):
        Haystack(["", " \n"], tokenizer)


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" 402517.", True),
        ("It is 402517, not 1.", True),
        ("402518", False),
        ("4025170", False),
        ("1 402517", False),
        ("", False),
    ],
)
def test_drawn_needle_is_answered_by_its_code_first(answer, right):
    assert NEEDLE.is_answered_by(answer) is right


@pytest.mark.parametrize(
    ("answer", "right"),
    [("Eat a SANDWICH.", True), ("sandwiches", False), ("a sandwich", True), ("", False), ("sand wich", False)],
)
def test_given_needle_is_answered_by_its_words(answer, right):
    assert niah.GivenNeedle("x", "y", "sandwich").is_answered_by(answer) is right


@pytest.mark.parametrize("trials", [1, 2, 5, 55, 1000])
def test_interval_holds_what_the_score_test_does_not_reject(trials):
    """The interval's ends are the shares p with (share - p)^2 = z^2 p (1 - p) / n."""
    z = NormalDist().inv_cdf(0.975)
    for correct in {0, 1, trials // 2, trials - 1, trials}:
        share = correct / trials
        ends = np.roots([1 + z * z / trials, -2 * share - z * z / trials, share * share])
        assert niah.wilson_interval(correct, trials) == pytest.approx(sorted(ends.real), abs=1e-7)


def test_interval_against_known_values():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    assert niah.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert niah.wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert niah.wilson_interval(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)


def test_cells_count_each_depth_and_all_depths():
    answers = [
        {"policy": policy, "length": 10, "depth": depth, "correct": right}
        for policy, depth, right in [
            ("dsa", 0, True), ("dsa", 0, False), ("dsa", 50, True), ("dsa", 50, True), ("misa", 0, False),
        ]
    ]  # fmt: skip
    cells = {(cell["policy"], cell["depth"]): (cell["correct"], cell["trials"]) for cell in niah.cells_of(answers)}
    assert cells == {
        ("dsa", 0): (1, 2), ("dsa", 50): (2, 2), ("dsa", None): (3, 4), ("misa", 0): (0, 1), ("misa", None): (0, 1),
    }  # fmt: skip


# ---------------------------------------------------------------- bad input


def niah_fails(capsys, tmp_path, part, *words):
    output = tmp_path / "out"
    assert cli.main(["niah", *map(str, words), "--output", str(output)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("misa-eval: error: ") and part in line
    assert not output.exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--depths", "0,101"], "--depths 101 is not a share"),
        (["--depths=-1"], "choose 0 to 100"),
        (["--depths", ","], "--depths names none"),
        (["--lengths", ""], "--lengths names none"),
        (["--lengths", "0"], "--lengths 0 is no length"),
        (["--lengths", "512,5000"], "--lengths 5000 is more than the model's 4096 tokens"),
        (["--lengths", "4000", "--max-model-len", "2000"], "--lengths 4000 is more than the model's 2000 tokens"),
        (["--lengths", "60"], "--lengths 60 has no room for text"),
        (["--policy", "misa,lisa"], 'cannot be \'lisa\''),
        (["--policy", ","], "no policy is named"),
        (["--options", '{"pool_block": 100}'], "pool_block=100"),
        (["--options", '{"policy": "dsa"}'], "name it with --policy"),
        (["--text", "nowhere.txt"], "--text nowhere.txt cannot be read"),
        (["--needle-text", "A sentence."], "belong together"),
        (["--needle-text", "A sentence.", "--question", "Why?", "--answer", ""], "belong together"),
        (["--url", "localhost:8000"], "is no address"),
        (["--url", "http://127.0.0.1:1"], "no OpenAI-compatible server answers at http://127.0.0.1:1"),
    ],
)
def test_bad_arguments(words, part, model, capsys, tmp_path):
    niah_fails(capsys, tmp_path, part, model, *words)


@pytest.mark.parametrize(("content", "part"), [(b" \n", "is empty"), (b"\xff\xfe", "is not UTF-8")])
def test_bad_text(content, part, model, capsys, tmp_path):
    file = tmp_path / "text"
    file.write_bytes(content)
    niah_fails(capsys, tmp_path, part, model, "--text", file)


def test_bad_models(model, capsys, tmp_path):
    niah_fails(capsys, tmp_path, "is not a model: there is no such folder", tmp_path / "nothing")
    (tmp_path / "nothing").mkdir()
    niah_fails(capsys, tmp_path, "is not a model", tmp_path / "nothing")
    llama = tmp_path / "llama"
    llama.mkdir()
    (llama / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    niah_fails(capsys, tmp_path, "LlamaForCausalLM has no DSA indexer", llama)
    (llama / "config.json").write_text((model / "config.json").read_text())
    niah_fails(capsys, tmp_path, "does not load", llama)


def test_output_that_cannot_be_written(model, capsys, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert cli.main(["niah", str(model), "--output", str(tmp_path / "out" / "deeper")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_default_lengths_end_at_the_models_limit():
    assert niah.lengths_within(None, 4096) == [1024, 2048, 4096]
    assert niah.lengths_within(None, 10**6)[-1] == 131072
    assert niah.lengths_within(None, 1000) == [1000]
    assert niah.lengths_within([5, 3, 5], None) == [3, 5]


# ---------------------------------------------------------------- a server


class FakeServer(ThreadingHTTPServer):
    """Finds the needle in a prompt and says its code, unless it stands in the text's middle."""

    daemon_threads = True

    def __init__(self, tokenizer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer = tokenizer
        self.requests: list[dict] = []
        self.failures: list[int] = []
        """Status codes of the next answers."""
        self.models = {"object": "list", "data": [{"id": "served", "object": "model", "max_model_len": 2048}]}
        self.metrics = ""
        self.url = f"http://127.0.0.1:{self.server_port}"

    def answer(self, request: dict) -> str:
        text = self.tokenizer.decode(request["prompt"])
        place = text.find("The access code")
        if 0.3 < place / len(text) < 0.7:
            return " unknown"
        return f" {text[place:].partition(' is ')[2][:6]}.\n"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def reply(self, status: int, content: str, kind: str = "application/json") -> None:
        body = content.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/v1/models":
            models = self.server.models
            self.reply(200, models if isinstance(models, str) else json.dumps(models))
        elif self.path == "/metrics":
            self.reply(200, self.server.metrics, "text/plain")
        else:
            self.reply(404, "{}")

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.failures:
            status = self.server.failures.pop()
            self.reply(status, json.dumps({"error": {"message": "no", "code": status}}))
            return
        self.server.requests.append(request)
        choice = {"index": 0, "text": self.server.answer(request), "finish_reason": "stop"}
        completion = {"id": "1", "object": "text_completion", "created": 0, "model": "served", "choices": [choice]}
        self.reply(200, json.dumps(completion))

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tokenizer, monkeypatch):
    monkeypatch.setattr(niah, "environment", lambda: {**ENVIRONMENT, "date": "2026-01-02"})
    for name in ("INITIAL_RETRY_DELAY", "MAX_RETRY_DELAY"):  # only makes the tests quicker
        monkeypatch.setattr(f"openai._base_client.{name}", 0.01, raising=False)
    running = FakeServer(tokenizer)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def test_server_is_asked_for_every_cell(server, model, tmp_path, capsys):
    words = ["--lengths", "2000,1024", "--depths", "0,50,100", "--seeds", "2", "--concurrency", "3"]
    assert cli.main(["niah", str(model), "--url", server.url + "/v1/", *words, "--output", str(tmp_path)]) == 0
    drawn = ["niah-server.png"] if can_draw("heat maps") else []
    assert sorted(file.name for file in tmp_path.iterdir()) == [*drawn, "niah.json"]
    result = json.loads((tmp_path / "niah.json").read_text())
    cells = {(cell["length"], cell["depth"]): cell for cell in result["cells"]}
    wanted = {(length, depth): 0 if depth == 50 else 2 for length in (1024, 2000) for depth in (0, 50, 100)}
    assert {key: cell["correct"] for key, cell in cells.items() if key[1] is not None} == wanted
    assert [cells[length, None]["correct"] for length in (1024, 2000)] == [4, 4]
    assert {cell["policy"] for cell in result["cells"]} == {"server"}
    assert Counter(len(request["prompt"]) for request in server.requests) == {1024 - 16: 6, 2000 - 16: 6}
    for request in server.requests:
        assert (request["temperature"], request["max_tokens"], request["model"]) == (0, 16, "served")
    assert len({tuple(request["prompt"]) for request in server.requests}) == 12
    assert result["environment"]["commit"] == "abc1234"
    assert result["texts"][0]["file"] == "us_constitution.txt"
    table = capsys.readouterr().out.splitlines()
    assert table[-1].split() == "server 2000 4 6 66.7% 30.0% to 90.3% 50%: 0%".split()


def test_drawn_needles_do_not_depend_on_what_else_is_asked(server, model, tmp_path):
    def answers(name, *words):
        folder = tmp_path / name
        assert cli.main(["niah", str(model), "--url", server.url, "--output", str(folder), *words]) == 0
        found = json.loads((folder / "niah.json").read_text())["answers"]
        return {(one["length"], one["depth"], one["seed"]): (one["expected"], one["needle_at"]) for one in found}

    one = answers("one", "--lengths", "512", "--depths", "30", "--seeds", "1", "--seed", "4")
    many = answers("many", "--lengths", "300,512", "--depths", "0,30", "--seeds", "3", "--seed", "3")
    assert one == {(512, 30, 4): many[512, 30, 4]}
    assert len({code for code, _ in many.values()}) == len(many) == 12


def test_passing_failures_are_asked_again(server, model, tmp_path):
    server.failures = [500, 429, 503]
    words = ["--lengths", "300", "--depths", "0", "--seeds", "2", "--concurrency", "1", "--output", str(tmp_path)]
    assert cli.main(["niah", str(model), "--url", server.url, *words]) == 0
    assert len(server.requests) == 2 and not server.failures


@pytest.mark.parametrize("failures", [[400], [500] * 4])
def test_lasting_failures_end_it(server, model, tmp_path, capsys, failures):
    server.failures = failures
    words = ["--lengths", "300", "--depths", "0", "--seeds", "1", "--output", str(tmp_path / "out")]
    assert cli.main(["niah", str(model), "--url", server.url, *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"misa-eval: error: the server at {server.url} did not answer: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("models", ["<html>hello</html>", {"object": "list", "data": []}, {"answer": 42}])
def test_not_an_openai_server(server, model, capsys, tmp_path, models):
    server.models = models
    niah_fails(capsys, tmp_path, f"at {server.url}", model, "--url", server.url)


METRICS = '# TYPE misa:config info\nmisa:config_info{policy="hierarchical",pool_block="128"} 1\n'


def test_server_tells_its_policy(server, model, capsys, tmp_path):
    server.metrics = METRICS
    words = [model, "--url", server.url, "--lengths", "300", "--depths", "0", "--seeds", "1"]
    assert cli.main(["niah", *map(str, words)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("hierarchical")
    niah_fails(capsys, tmp_path, "runs policy hierarchical, not misa", *words, "--policy", "misa")
    niah_fails(capsys, tmp_path, "a running server has one policy", *words, "--policy", "hierarchical,misa")
    words[words.index("300")] = "2049"
    niah_fails(capsys, tmp_path, "--lengths 2049 is more than the model's 2048 tokens", *words)


def test_given_needle_in_a_chat(server, model, tmp_path):
    needle = ["--needle-text", "The best soup is leek.", "--question", "Which soup is best?", "--answer", "leek"]
    server.answer = lambda request: "It is Leek soup."
    words = ["--lengths", "500", "--depths", "10", "--seeds", "2", "--chat", "--output", str(tmp_path)]
    assert cli.main(["niah", str(model), "--url", server.url, *needle, *words]) == 0
    assert json.loads((tmp_path / "niah.json").read_text())["cells"][0]["correct"] == 2
    for request in server.requests:
        text = server.tokenizer.decode(request["prompt"])
        assert len(request["prompt"]) == 500 - 64
        assert text.count("The best soup is leek.") == 1 and text.endswith("\n\nWhich soup is best?<|assistant|>")


# ---------------------------------------------------------------- engines


def test_engine_arguments():
    parser = argparse.ArgumentParser()
    niah.add_arguments(parser)
    words = ["m", "--dtype", "float32", "--tensor-parallel-size", "2", "--options", '{"active_heads": 4}']
    args = parser.parse_args([*words, "--engine-options", '{"max_num_seqs": 3}'])
    assert engines.llm_arguments(args, "hisa") == {
        "model": "m", "attention_backend": "misa", "dtype": "float32", "tensor_parallel_size": 2, "max_num_seqs": 3,
        "additional_config": {"misa": {"active_heads": 4, "policy": "hisa"}},
    }  # fmt: skip


def stand_in_for_python(monkeypatch, tmp_path, body):
    """Let the engine's process run `body` instead, with its folder in $4."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def test_results_arrive_while_the_engine_runs(monkeypatch, tmp_path):
    go_on = tmp_path / "go-on"
    body = f"""
        printf '{{"number": 0}}\\n{{"num' >> "$4/results.jsonl"
        until test -e {go_on}; do sleep 0.05; done
        printf 'ber": 1}}\\n' >> "$4/results.jsonl" """
    stand_in_for_python(monkeypatch, tmp_path, body)
    found = []

    def receive(result):
        found.append(result["number"])
        go_on.touch()

    engines.run_child("anything", {"a": 1}, receive)
    assert found == [0, 1]


def test_engine_that_breaks_off(monkeypatch, tmp_path, capsys):
    stand_in_for_python(monkeypatch, tmp_path, "seq 100; exit 3")
    with pytest.raises(engines.EngineFailure, match="code 3"):
        engines.run_child("anything", {}, print)
    assert capsys.readouterr().err.split() == [str(i) for i in range(81, 101)]


def test_a_policy_that_fails_leaves_the_others(monkeypatch, tmp_path, capsys, model):
    def answer_offline(args, policy, prompts, answer_tokens, receive):
        if policy == "misa":
            raise engines.EngineFailure("its process ended with code 1")
        for number in range(len(prompts)):
            receive(number, "")

    monkeypatch.setattr(niah, "answer_offline", answer_offline)
    monkeypatch.setattr(niah, "environment", lambda: {**ENVIRONMENT, "date": "2026-01-02"})
    words = ["--lengths", "300", "--depths", "0", "--seeds", "1", "--output", str(tmp_path)]
    assert cli.main(["niah", str(model), *words, "--policy", "misa,dsa"]) == 1
    result = json.loads((tmp_path / "niah.json").read_text())
    assert {cell["policy"] for cell in result["cells"]} == {"dsa"}
    assert result["failures"] == ["policy misa: its process ended with code 1"]
    assert "misa-eval: failed: policy misa" in capsys.readouterr().err


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """The name of a module for children; what it does stands in the environment variable STUB."""
    (tmp_path / "stub_tool.py").write_text(
        "import os, time\n"
        "from misa_vllm.settings import MISAConfigError\n"
        "def serve_plan(folder):\n"
        "    if os.environ['STUB'] == 'refuse':\n"
        "        raise MISAConfigError('choose another model')\n"
        "    print(os.getpid(), file=open(os.environ['STUB'], 'w'), flush=True)\n"
        "    time.sleep(600)\n"
    )
    root = str(tiny.TRAINING_TEXT.parents[2])
    path = [str(tmp_path), root, *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    return "stub_tool"


def test_engine_that_refuses_is_one_line(stub, monkeypatch, capsys):
    monkeypatch.setenv("STUB", "refuse")
    with pytest.raises(EvalError, match="^choose another model$"):
        engines.run_child(stub, {}, print)
    assert capsys.readouterr() == ("", "")


def test_engine_ends_with_its_parent(stub, monkeypatch, tmp_path):
    pid_file = tmp_path / "pid"
    monkeypatch.setenv("STUB", str(pid_file))
    code = f"from misa_vllm.eval import engines; engines.run_child({stub!r}, {{}}, print)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 120
        while not (pid_file.exists() and pid_file.read_text().endswith("\n")):
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
    assert gone(int(pid_file.read_text()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this test runs the CPU engine")
def test_one_cell_of_a_real_engine(model, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    words = ["--lengths", "321", "--depths", "40", "--seeds", "2", "--policy", "hierarchical", "--dtype", "float32"]
    words += ["--options", '{"pool_block": 64, "candidates": 128, "min_context": 0}', "--tokenizer-mode", "hf"]
    words += ["--output", str(tmp_path)]
    assert cli.main(["niah", str(model), *words]) == 0
    result = json.loads((tmp_path / "niah.json").read_text())
    assert [(one["prompt_tokens"], one["seed"]) for one in result["answers"]] == [(305, 0), (305, 1)]
    assert all(one["answer"] for one in result["answers"])
    (cell, _) = result["cells"]
    assert (cell["policy"], cell["trials"]) == ("hierarchical", 2)
    assert result["environment"]["vllm"]
