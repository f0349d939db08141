"""LongBench: the data folder, the table, and (where lm-eval is installed) its tasks over local files."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from misa_vllm.eval import cli, engines, longbench
from misa_vllm.eval.report import EvalError
from misa_vllm.models import tiny

DATA = Path(__file__).parent / "data" / "longbench"
TASKS = sorted(file.stem for file in DATA.glob("*.jsonl"))
ENVIRONMENT = {name: "x" for name in ("hardware", "vllm", "torch", "misa_vllm", "commit", "date")}

with_lm_eval = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in longbench.REQUIRED_MODULES),
    reason='lm-eval is not installed: pip install "misa_vllm[eval]"',
)


@pytest.fixture
def known(monkeypatch):
    """LongBench's tasks where there is no lm-eval to tell them."""
    names = [*TASKS, "qasper", "hotpotqa_e"]
    monkeypatch.setattr(longbench, "known_tasks", lambda: {name: Path(f"{name}.yaml") for name in names})
    monkeypatch.setattr(longbench, "require_lm_eval", lambda: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("longbench") / "model"
    tiny.write_model(folder, tiny.TinySize(topk=64, vocab=600))
    return folder


def copy_of_data(folder, **lines):
    """The sample data with some tasks' files replaced."""
    shutil.copytree(DATA, folder)
    for task, content in lines.items():
        (folder / f"{task}.jsonl").write_bytes(content)
    return folder


# ---------------------------------------------------------------- bad input


def longbench_fails(capsys, tmp_path, part, *words):
    output = tmp_path / "out"
    assert cli.main(["longbench", *map(str, words), "--output", str(output)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("misa-eval: error: ") and part in line
    assert not output.exists()


def test_without_lm_eval(monkeypatch, capsys, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("lm_eval", "rouge") else find(name))
    longbench_fails(capsys, tmp_path, 'pip install "misa_vllm[eval]"', "model", "--data", DATA)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--data", "nowhere"], "--data nowhere is no folder"),
        (["--data", Path(__file__).parent], "has no task: files are named as LongBench's"),
        (["--data", DATA, "--tasks", "trek"], "--tasks trek is no task of LongBench: choose of"),
        (["--data", DATA, "--tasks", "trec,qasper"], "has no qasper.jsonl"),
        (["--data", DATA, "--tasks", ","], "--tasks names none"),
        (["--data", DATA, "--policy", "misa,lisa"], "cannot be 'lisa'"),
        (["--data", DATA, "--policy", ","], "no policy is named"),
        (["--data", DATA, "--options", '{"active_heads": 65}'], "choose 1 to 64"),
    ],
)
def test_bad_arguments(known, model, words, part, capsys, tmp_path):
    longbench_fails(capsys, tmp_path, part, model, *words)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "hotpotqa.jsonl has no question"),
        (b"\n{\n", "hotpotqa.jsonl, line 2: not JSON"),
        (b"[1]\n", "line 1: not a JSON object"),
        (b'{"input": "a", "answers": ["b"]}\n', 'line 1: no "context"'),
        (b'{"input": "a", "context": "b", "answers": "c"}\n', 'line 1: no "answers" of the kind'),
        (b'{"input": "a", "context": "b", "answers": []}\n', '"answers" is empty'),
        (b"\xff\n", "is not UTF-8 text"),
    ],
)
def test_bad_data(known, model, content, part, capsys, tmp_path):
    data = copy_of_data(tmp_path / "data", hotpotqa=content)
    longbench_fails(capsys, tmp_path, part, model, "--data", data)


def test_classification_needs_classes(tmp_path):
    file = tmp_path / "trec.jsonl"
    file.write_text('{"input": "a", "context": "b", "answers": ["c"], "all_classes": null}\n')
    assert longbench.check_questions(file, "hotpotqa") == 1
    for task in ("trec", "trec_e", "lsht"):
        with pytest.raises(EvalError, match=f'"all_classes", which {task} needs'):
            longbench.check_questions(file, task)


# ---------------------------------------------------------------- policies in turn


def test_policies_in_turn(known, model, monkeypatch, tmp_path, capsys):
    plans = []

    def run_child(module, plan, receive):
        plans.append(plan)
        policy = plan["llm"]["additional_config"]["misa"]["policy"]
        if policy == "hisa":
            raise engines.EngineFailure("its process ended with code 1")
        for task in plan["files"]:
            error = 0.25 if task == "hotpotqa" else None
            receive({"task": task, "score": 0.5 if policy == "misa" else 0.25, "standard_error": error,
                     "questions": 3, "answers": []})  # fmt: skip

    monkeypatch.setattr(engines, "run_child", run_child)
    monkeypatch.setattr(longbench, "environment", lambda: dict(ENVIRONMENT))
    monkeypatch.setattr(longbench.importlib, "metadata", SimpleNamespace(version=lambda name: "0.4"))
    words = ["--tasks", "trec,hotpotqa", "--policy", "dsa,hisa,misa", "--limit", "3", "--output", str(tmp_path)]
    assert cli.main(["longbench", str(model), "--data", str(DATA), *words]) == 1
    assert [plan["llm"]["additional_config"]["misa"]["policy"] for plan in plans] == ["dsa", "hisa", "misa"]
    assert {(plan["limit"], plan["chat"], *plan["files"]) for plan in plans} == {(3, False, "trec", "hotpotqa")}
    table = capsys.readouterr().out.splitlines()[2:]
    assert [line.split() for line in table] == [
        ["task", "questions", "dsa", "misa"],
        ["trec", "3", "25.00", "50.00"],
        "hotpotqa 3 25.00 ± 25.00 50.00 ± 25.00".split(),
        "mean of the tasks 25.00 50.00".split(),
    ]
    result = json.loads((tmp_path / "longbench.json").read_text())
    assert result["failures"] == ["policy hisa: its process ended with code 1"]
    assert result["tasks"]["hotpotqa"]["questions"] == 3
    assert len(result["rows"]) == 4 and result["environment"]["lm_eval"] == "0.4"
    assert (tmp_path / "longbench.txt").read_text().splitlines()[2:] == table


# ---------------------------------------------------------------- lm-eval


class Answerer:
    """Gives lm-eval the first reference answer, or nonsense, to every question."""

    def __new__(cls, right):
        from lm_eval.api.model import LM

        class Model(LM):
            def generate_until(self, requests, disable_tqdm=False):
                self.prompts = [request.args[0] for request in requests]
                return [request.doc["answers"][0] if right else "@" for request in requests]

            def loglikelihood(self, requests, disable_tqdm=False):
                raise NotImplementedError

            loglikelihood_rolling = loglikelihood

        return Model()


@with_lm_eval
@pytest.mark.parametrize("task", TASKS)
def test_tasks_are_lm_evals_over_the_local_file(task, tmp_path, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    # lm-eval asks pip for all packages after every task: seconds that tell nothing here
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")
    longbench.write_tasks({task: str(DATA / f"{task}.jsonl")}, tmp_path / "tasks")
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    questions = [json.loads(line) for line in (DATA / f"{task}.jsonl").read_text().splitlines()]
    for right in (True, False):
        model = Answerer(right)
        evaluated = simple_evaluate(model=model, tasks=[task], task_manager=manager)
        assert evaluated["results"][task]["score,none"] == pytest.approx(float(right), abs=1e-6)
        assert len(evaluated["samples"][task]) == len(questions)
    for question in questions:
        assert any(question["context"] in prompt and question["input"] in prompt for prompt in model.prompts)
    assert all(prompt.rstrip() not in (question["context"] for question in questions) for prompt in model.prompts)


@with_lm_eval
def test_lm_eval_knows_longbenchs_tasks():
    known = longbench.known_tasks()
    assert len([name for name in known if not name.endswith("_e")]) == 21
    assert {*longbench.CLASSIFICATION, *longbench.WITHOUT_CHAT, *TASKS} <= set(known)


@with_lm_eval
@pytest.mark.skipif(torch.cuda.is_available(), reason="this test runs the CPU engine")
def test_real_engine(model, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    words = ["--tasks", "hotpotqa,trec", "--limit", "2", "--chat", "--policy", "misa", "--dtype", "float32"]
    words += ["--max-model-len", "512", "--tokenizer-mode", "hf", "--options", '{"pool_block": 64}']
    assert cli.main(["longbench", str(model), "--data", str(DATA), *words, "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "longbench.json").read_text())["rows"]
    assert [(row["task"], row["policy"], row["questions"]) for row in rows] == [
        ("hotpotqa", "misa", 2), ("trec", "misa", 2),
    ]  # fmt: skip
    wanted = [json.loads(line)["_id"] for line in (DATA / "hotpotqa.jsonl").read_text().splitlines()][:2]
    assert [answer["id"] for answer in rows[0]["answers"]] == wanted
    assert all(0 <= row["score"] <= 1 for row in rows)
