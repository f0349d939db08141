"""Engines in processes of their own, one policy after the other, so that each frees all memory before the next starts.

A tool that needs one is a module whose `serve_plan(folder)` does the work in the child: it reads `folder`/plan.json and
calls `Results.add` for what it finds, which the parent receives while the child runs.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from misa_vllm import processes
from misa_vllm.bench.report import at_least, one_line
from misa_vllm.bench.serve_shapes import json_object
from misa_vllm.config import resolve_settings
from misa_vllm.eval.report import EvalError
from misa_vllm.policies import POLICIES
from misa_vllm.settings import IndexerSettings, MISAConfigError

DEFAULT_POLICIES = ("dsa", "misa", "hierarchical")
POLL_S = 0.1


class EngineFailure(Exception):
    """An engine's process ended before its work did; the message is one line."""


# ---------------------------------------------------------------- arguments


def comma_list(text: str) -> list[str]:
    """An argparse type: words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str) -> list[int]:
    """An argparse type: whole numbers between commas."""
    return [int(word) for word in comma_list(text)]


ENGINE_ARGUMENTS = {
    "dtype": str,
    "max_model_len": at_least(1),
    "max_num_batched_tokens": at_least(1),
    "tensor_parallel_size": at_least(1),
    "gpu_memory_utilization": float,
    "tokenizer_mode": str,
    "kv_cache_dtype": str,
}


def add_engine_arguments(parser: argparse.ArgumentParser, left_out: tuple[str, ...] = (), **defaults: object) -> None:
    """Options of the engine as `vllm serve` names them, without those left out."""
    group = parser.add_argument_group("engine")
    for name, kind in ENGINE_ARGUMENTS.items():
        if name not in left_out:
            default = defaults.get(name)
            text = "as of vllm serve" + (f"; default {default} here" if default is not None else "")
            group.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=text)
    text = "more arguments of vLLM's LLM, e.g. '{\"max_num_seqs\": 16}'"
    group.add_argument("--engine-options", type=json_object, default={}, metavar="JSON", help=text)


def engine_arguments(args: argparse.Namespace) -> dict:
    """What the user says of the engine, as arguments of vLLM's `LLM`."""
    given = {name: getattr(args, name, None) for name in ENGINE_ARGUMENTS}
    return {name: value for name, value in given.items() if value is not None} | args.engine_options


def add_backend_options(parser: argparse.ArgumentParser) -> None:
    text = 'the backend\'s options besides the policy, e.g. \'{"active_heads": 8, "pool_block": 128}\''
    parser.add_argument("--options", type=json_object, default={}, metavar="JSON", help=text)


def llm_arguments(args: argparse.Namespace, policy: str) -> dict:
    """The arguments of vLLM's `LLM` under a policy."""
    return {
        "model": args.model,
        "attention_backend": "misa",
        "additional_config": {"misa": {**args.options, "policy": policy}},
        **engine_arguments(args),
    }


def model_config(model: str) -> dict:
    """The model's config.json, the part about its text.

    Raises:
        EvalError: there is none.
    """
    from transformers import PretrainedConfig

    if model.startswith((".", "/", "~")) and not Path(model).is_dir():  # a hub's names begin otherwise
        raise EvalError(f"{model} is not a model: there is no such folder")
    try:
        config, _ = PretrainedConfig.get_config_dict(model)
    except (OSError, ValueError) as error:
        raise EvalError(f"{model} is not a model: {str(error).splitlines()[0]}") from None
    if not config:
        raise EvalError(f"{model} is not a model: it has no config.json")
    return config.get("text_config") or config


def check_policies(policies: list[str], options: dict, config: dict) -> list[IndexerSettings]:
    """The settings of each policy for the model.

    Raises:
        EvalError, MISAConfigError: a policy is unknown, or cannot serve the model with these options.
    """
    if not policies:
        raise EvalError(f"no policy is named: choose of {', '.join(POLICIES)}")
    if "policy" in options:
        raise EvalError('the policy does not belong into --options: name it with --policy, as in "--policy misa,dsa"')
    of_model = SimpleNamespace(**config)
    return [resolve_settings({**options, "policy": name}, of_model) for name in policies]


def load_tokenizer(model: str):
    """The model's Hugging Face tokenizer.

    Raises:
        EvalError: it has none, or none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # whatever a tokenizer's file makes the library raise
        raise EvalError(f"the tokenizer of {model} does not load: {one_line(error)}") from None


# ---------------------------------------------------------------- the parent's side


def run_child(
    module: str, plan: dict, receive: Callable[[dict], None], files: Callable[[Path], None] | None = None
) -> None:
    """Run `module`.serve_plan in a process of its own.

    Args:
        plan: what the child finds as plan.json in its folder.
        receive: called with each result, in the order in which the child adds them.
        files: called with the folder before the child starts, to leave more in it.

    Raises:
        EvalError: the engine refused the model or the options.
        EngineFailure: the process ended in another way; the end of its log has been printed to stderr.
    """
    with tempfile.TemporaryDirectory(prefix="misa-eval-") as name:
        folder = Path(name)
        (folder / "plan.json").write_text(json.dumps(plan))
        if files is not None:
            files(folder)
        results = folder / Results.NAME
        results.touch()
        command = [sys.executable, "-m", "misa_vllm.eval.engines", module, str(folder)]
        # the sampler that needs no compiler; the engine in the same process, which starts and ends sooner
        environment = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | os.environ
        refusal = None
        with (
            (folder / "log").open("wb") as log,
            results.open() as lines,
            processes.started(command, stdout=log, stderr=subprocess.STDOUT, env=environment) as child,
        ):
            ended = False
            while not ended:
                ended = child.poll() is not None  # what it wrote last is read once more
                for result in _whole_lines(lines):
                    if "refused" in result:
                        refusal = result["refused"]
                    else:
                        receive(result)
                time.sleep(0 if ended else POLL_S)
        if refusal is not None:
            raise EvalError(refusal)
        if child.returncode:
            print(*processes.tail(folder / "log"), sep="\n", file=sys.stderr)
            raise EngineFailure(f"its process ended with code {child.returncode}")


def _whole_lines(file):
    """The JSON objects on the lines that are complete; what is behind the last line end is left for later."""
    while True:
        start = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(start)
            return
        yield json.loads(line)


# ---------------------------------------------------------------- the child's side


class Results:
    """Where the child leaves what it finds."""

    NAME = "results.jsonl"

    def __init__(self, folder: Path) -> None:
        self._file = (folder / self.NAME).open("a")

    def add(self, **result) -> None:
        self._file.write(json.dumps(result) + "\n")
        self._file.flush()


def register_backend() -> None:
    """Make the backend known before an engine is made; vLLM does it itself where the package is installed."""
    from misa_vllm.plugin import register

    register()


def child_main(module: str, folder: Path) -> int:
    """Run a tool's half of the work; the exit code."""
    try:
        importlib.import_module(module).serve_plan(folder)
    except (EvalError, MISAConfigError) as error:
        Results(folder).add(refused=str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(child_main(sys.argv[1], Path(sys.argv[2])))
