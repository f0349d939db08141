"""LongBench through lm-eval: all policies over the same questions, one table.

The data is yours: a folder with the jsonl files that LongBench publishes (hotpotqa.jsonl, trec.jsonl, ...; those of
LongBench-E end in _e.jsonl), a question a line with the fields input, context, answers and all_classes. Nothing is
downloaded. Prompts, answer lengths and metrics are those of lm-eval's longbench tasks; a prompt that is too long for
the model loses its middle, as in LongBench's own code. Each policy runs in an engine of its own, one after the other.
Needs lm-eval: pip install "misa_vllm[eval]".
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from misa_vllm.bench import report
from misa_vllm.bench.report import at_least, environment, require_folder
from misa_vllm.eval import engines
from misa_vllm.eval.report import EvalError, described

REQUIRED_MODULES = ("lm_eval", "jieba", "fuzzywuzzy", "rouge")
FIELDS = {"input": str, "context": str, "answers": list}
CLASSIFICATION = ("trec", "lsht")
"""Tasks whose metric looks for one of `all_classes`."""
WITHOUT_CHAT = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
"""Few-shot and code tasks: LongBench continues these as text also where a model chats."""
MEAN = "mean of the tasks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a DSA checkpoint's folder or name")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="LongBench's jsonl files")
    text = "names of files without .jsonl, between commas (default: every task in the folder)"
    parser.add_argument("--tasks", type=engines.comma_list, help=text)
    text = f"policies between commas (default: {','.join(engines.DEFAULT_POLICIES)}; also: hisa)"
    parser.add_argument("--policy", type=engines.comma_list, default=list(engines.DEFAULT_POLICIES), help=text)
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="only the first N questions of each task")
    text = "ask in the model's chat template, but for the few-shot and code tasks, as LongBench does"
    parser.add_argument("--chat", action="store_true", help=text)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write longbench.json and longbench.txt there")
    engines.add_backend_options(parser)
    engines.add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm  # comes with vLLM

    require_folder(args.output)
    require_lm_eval()
    files = task_files(args.data, args.tasks)
    policies = list(dict.fromkeys(args.policy))
    engines.check_policies(policies, args.options, engines.model_config(args.model))
    questions = {task: {"questions": check_questions(file, task)} | described(file) for task, file in files.items()}

    rows, failures = [], []
    for policy in policies:
        plan = {
            "llm": engines.llm_arguments(args, policy),
            "files": {task: str(file.resolve()) for task, file in files.items()},
            "limit": args.limit,
            "chat": args.chat,
        }
        found: list[dict] = []
        with tqdm(total=len(files), desc=policy, unit=" tasks") as bar:

            def receive(result: dict, policy=policy, found=found, bar=bar) -> None:
                found.append({"policy": policy, **result})
                bar.update()

            try:
                engines.run_child(__name__, plan, receive)
            except engines.EngineFailure as failure:
                failures.append(f"policy {policy}: {failure}")
                continue
        rows += found
    if not rows:
        raise EvalError("; ".join(failures))
    result = {
        "tool": "longbench",
        "command": shlex.join(["misa-eval", *sys.argv[1:]]),
        "arguments": report.plain(vars(args)),
        "environment": environment() | {"lm_eval": importlib.metadata.version("lm_eval")},
        "tasks": questions,
        "rows": rows,
        "failures": failures,
    }
    table = as_text(result)
    print(table)
    if args.output is not None:
        report.write_text(args.output / "longbench.txt", table + "\n")
        report.write_text(args.output / "longbench.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    for failure in failures:
        print(f"misa-eval: failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


# ---------------------------------------------------------------- tasks


def require_lm_eval() -> None:
    """Raise EvalError unless lm-eval and what its longbench metrics import are here."""
    missing = [name for name in REQUIRED_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise EvalError(f'longbench needs {", ".join(missing)}: pip install "misa_vllm[eval]"')


def known_tasks() -> dict[str, Path]:
    """LongBench's names -> lm-eval's definitions."""
    (package,) = importlib.util.find_spec("lm_eval").submodule_search_locations
    return {file.stem: file for file in sorted(Path(package, "tasks", "longbench").glob("[!_]*.yaml"))}


def task_files(folder: Path, names: list[str] | None) -> dict[str, Path]:
    """Task -> its file of questions, of the tasks named or of all in the folder.

    Raises:
        EvalError: the folder holds none of them.
    """
    if not folder.is_dir():
        raise EvalError(f"--data {folder} is no folder: name one with LongBench's jsonl files")
    known = known_tasks()
    present = {file.stem: file for file in sorted(folder.glob("*.jsonl"))}
    if names is None:
        files = {name: file for name, file in present.items() if name in known}
        if not files:
            raise EvalError(f"--data {folder} has no task: files are named as LongBench's, such as hotpotqa.jsonl")
        return files
    if not names:
        raise EvalError("--tasks names none: give names between commas")
    for name in names:
        if name not in known:
            raise EvalError(f"--tasks {name} is no task of LongBench: choose of {', '.join(known)}")
        if name not in present:
            raise EvalError(f"--data {folder} has no {name}.jsonl: it has {', '.join(present) or 'no jsonl file'}")
    return {name: present[name] for name in dict.fromkeys(names)}


def check_questions(file: Path, task: str) -> int:
    """How many questions a file has.

    Raises:
        EvalError: a line is not a question, or there is none.
    """
    count = 0
    for number, line in _lines(file):
        try:
            question = json.loads(line)
        except ValueError:
            raise EvalError(f"{file}, line {number}: not JSON, LongBench has a question a line") from None
        if not isinstance(question, dict):
            raise EvalError(f"{file}, line {number}: not a JSON object")
        for name, kind in FIELDS.items():
            if not isinstance(question.get(name), kind):
                raise EvalError(f'{file}, line {number}: no "{name}" of the kind that LongBench has')
        if not question["answers"]:
            raise EvalError(f'{file}, line {number}: "answers" is empty')
        if task.removesuffix("_e") in CLASSIFICATION and not question.get("all_classes"):
            raise EvalError(f'{file}, line {number}: no "all_classes", which {task} needs')
        count += 1
    if not count:
        raise EvalError(f"{file} has no question")
    return count


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        with file.open(encoding="utf-8") as lines:
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    except OSError as error:
        raise EvalError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise EvalError(f"{file} is not UTF-8 text") from None


def write_tasks(files: dict[str, str], folder: Path) -> None:
    """lm-eval's own definition of each task, over a local file instead of a hub's data set."""
    known = known_tasks()
    folder.mkdir()
    for task, file in files.items():
        source = {"data_files": {"test": file}, "cache_dir": str(folder.parent / "cache")}
        definition = [
            f"include: {json.dumps(str(known[task]))}",
            f"task: {json.dumps(task)}",
            "dataset_path: json",
            "dataset_name: null",
            f"dataset_kwargs: {json.dumps(source)}",
            f"process_docs: !function {__name__}.with_lm_evals_names",
        ]
        (folder / f"{task}.yaml").write_text("\n".join(definition) + "\n", encoding="utf-8")


def with_lm_evals_names(questions):
    """A `datasets.Dataset` whose columns are called as lm-eval's prompts call them: `input` is `question` there."""
    return questions.rename_column("input", "question")


# ---------------------------------------------------------------- in the engine's process


def serve_plan(folder: Path) -> None:
    """Score every task of the plan in `folder`."""
    plan = json.loads((folder / "plan.json").read_text())
    write_tasks(plan["files"], folder / "tasks")
    # the datasets library would report each file it reads to its hub
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    engines.register_backend()
    from lm_eval import simple_evaluate
    from lm_eval.models.vllm_causallms import VLLM
    from lm_eval.tasks import TaskManager

    arguments = dict(plan["llm"])
    model = VLLM(pretrained=arguments.pop("model"), batch_size="auto", truncation_side="middle", **arguments)
    tasks = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    results = engines.Results(folder)
    for task in plan["files"]:
        evaluated = simple_evaluate(
            model=model,
            tasks=[task],
            limit=plan["limit"],
            apply_chat_template=plan["chat"] and task.removesuffix("_e") not in WITHOUT_CHAT,
            task_manager=tasks,
        )
        scores, samples = evaluated["results"][task], evaluated["samples"][task]
        error = scores.get("score_stderr,none")
        results.add(
            task=task,
            score=scores["score,none"],
            standard_error=error if isinstance(error, float) else None,
            questions=len(samples),
            answers=[
                {"id": sample["doc"].get("_id"), "answer": sample["resps"][0][0], "score": sample["score"]}
                for sample in samples
            ],
        )


# ---------------------------------------------------------------- figures


def as_text(result: dict) -> str:
    """Scores of 100, a task a line and a policy a column, with standard errors, and their mean."""
    rows = {(row["task"], row["policy"]): row for row in result["rows"]}
    policies = list(dict.fromkeys(policy for _, policy in rows))
    tasks = list(dict.fromkeys(task for task, _ in rows))
    lines = []
    for task in tasks:
        of_task = [rows[task, policy] for policy in policies]
        lines.append([task, str(of_task[0]["questions"]), *map(_cell, of_task)])
    means = [sum(rows[task, policy]["score"] for task in tasks) / len(tasks) for policy in policies]
    lines.append([MEAN, "", *(f"{100 * mean:.2f}" for mean in means)])
    table = report.aligned_table(["task", "questions", *policies], lines, left=1)
    return f"{_headline(result)}\n\n{table}"


def _cell(row: dict) -> str:
    error = row["standard_error"]
    return f"{100 * row['score']:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def _headline(result: dict) -> str:
    told = result["environment"]
    versions = ", ".join(f"{name} {told[name]}" for name in ("vllm", "torch", "lm_eval", "misa_vllm", "commit"))
    return f"{told['hardware']}, {versions}, {told['date']}"
