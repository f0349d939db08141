"""Needle in a haystack: hides a sentence at a depth of a long text, asks for it and counts right answers.

Every prompt has an exact length: special tokens, text, needle, question and the room for the answer make up the number
in --lengths. Decoding is greedy, an answer is right if its first number is the needle's. Offline (the default) each
policy runs in an engine of its own, one after the other; --url asks a running server, whose policy is what it was
started with (its key, if it wants one, is read from OPENAI_API_KEY). MODEL is needed for its tokenizer there.
"""

import argparse
import json
import math
import os
import random
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from misa_vllm.bench import report
from misa_vllm.bench.report import at_least, environment, require_folder
from misa_vllm.demo import DOCUMENT, DemoError, read_counters
from misa_vllm.eval import engines
from misa_vllm.eval.haystack import Haystack, Prompt, PromptBuilder
from misa_vllm.eval.needles import Needle, draw_needle
from misa_vllm.eval.report import EvalError, can_draw, described

SHORTEST, LONGEST = 1024, 131072
DEPTHS = list(range(0, 101, 10))
ANSWER_TOKENS, CHAT_ANSWER_TOKENS = 16, 64
"""Room for an answer: a code goes on from the question, an assistant may wrap it into a sentence."""
CONFIDENCE_Z = 1.959963984540054
"""Standard normal quantile of a two-sided 95% interval."""
RETRIES = 3
REQUEST_TIMEOUT_S = 3600.0  # a long prompt waits for those before it


@dataclass(frozen=True)
class GivenNeedle:
    """A needle in the user's words."""

    sentence: str
    question: str
    code: str

    @property
    def chat_question(self) -> str:
        return self.question

    def is_answered_by(self, answer: str) -> bool:
        """Whether `answer` holds the expected words, whatever their case."""
        return re.search(rf"(?<!\w){re.escape(self.code)}(?!\w)", answer, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Trial:
    """One prompt to answer."""

    length: int
    depth: int
    """Per cent."""
    seed: int
    needle: Needle | GivenNeedle


# ---------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    count = at_least(1)
    parser.add_argument("model", help="a DSA checkpoint's folder or name")
    parser.add_argument("--url", help="a running OpenAI-compatible server, e.g. http://localhost:8000")
    text = f"tokens, between commas (default: powers of two from {SHORTEST} to {LONGEST} or the model's limit)"
    parser.add_argument("--lengths", type=engines.numbers, help=text)
    text = "where the needle stands, per cent of the text, between commas (default: 0,10,...,100)"
    parser.add_argument("--depths", type=engines.numbers, default=DEPTHS, help=text)
    text = f"offline: policies between commas (default: {','.join(engines.DEFAULT_POLICIES)}; also: hisa)"
    parser.add_argument("--policy", type=engines.comma_list, help=text)
    parser.add_argument("--seeds", type=count, default=5, help="trials per length and depth (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first of them (default: %(default)s)")
    text = "the haystack; a longer prompt goes through the files again (default: the U.S. Constitution)"
    parser.add_argument("--text", type=Path, nargs="+", default=[DOCUMENT], metavar="FILE", help=text)
    parser.add_argument("--needle-text", help="the hidden sentence (default: an access code, drawn for each trial)")
    parser.add_argument("--question", help="what is asked; needed with --needle-text")
    parser.add_argument("--answer", help="words that a right answer holds; needed with --needle-text")
    parser.add_argument("--chat", action="store_true", help="ask in the model's chat template")
    text = f"room for an answer (default: {ANSWER_TOKENS}, with --chat {CHAT_ANSWER_TOKENS})"
    parser.add_argument("--max-tokens", type=count, help=text)
    parser.add_argument("--concurrency", type=count, default=8, help="prompts at a time (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write niah.json and a heat map per policy there")
    engines.add_backend_options(parser)
    engines.add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm  # comes with vLLM

    check_arguments(args)
    require_folder(args.output)
    documents = read_documents(args.text)
    config = engines.model_config(args.model)
    if args.url is None:
        policies = list(dict.fromkeys(engines.DEFAULT_POLICIES if args.policy is None else args.policy))
        engines.check_policies(policies, args.options, config)
        limit = args.max_model_len or config.get("max_position_embeddings")
        server = None
    else:
        server = Server(args.url)
        policies, limit = [server.policy(args.policy)], server.max_model_len
    lengths = lengths_within(args.lengths, limit)
    answer_tokens = args.max_tokens or (CHAT_ANSWER_TOKENS if args.chat else ANSWER_TOKENS)
    tokenizer = engines.load_tokenizer(args.model)
    builder = PromptBuilder(Haystack(documents, tokenizer), tokenizer, args.chat)
    trials = list(trials_of(args, lengths))
    prompts = build_prompts(builder, trials, answer_tokens)
    if builder.haystack.tokens < max(lengths):
        print(
            f"misa-eval: the text has {builder.haystack.tokens} tokens and is gone through again in longer prompts: "
            "give more with --text",
            file=sys.stderr,
        )

    answers, failures = [], []
    for policy in policies:
        found: dict[int, str] = {}
        with tqdm(total=len(trials), desc=policy, unit=" prompts") as bar:

            def receive(number: int, text: str, found=found, bar=bar) -> None:
                found[number] = text
                bar.update()

            try:
                if server is None:
                    answer_offline(args, policy, prompts, answer_tokens, receive)
                else:
                    server.answer([prompt.ids for prompt in prompts], answer_tokens, args.concurrency, receive)
            except engines.EngineFailure as failure:
                failures.append(f"policy {policy}: {failure}")
                continue
        answers += [answer_record(policy, *one, found[i]) for i, one in enumerate(zip(trials, prompts, strict=True))]
    if not answers:
        raise EvalError("; ".join(failures))
    result = {
        "tool": "niah",
        "command": shlex.join(["misa-eval", *sys.argv[1:]]),
        "arguments": report.plain(vars(args) | {"text": None}),
        "environment": environment(),
        "server": None if server is None else server.description,
        "answer_tokens": answer_tokens,
        "texts": [described(file) for file in args.text],
        "text_tokens": builder.haystack.tokens,
        "cells": cells_of(answers),
        "answers": answers,
        "failures": failures,
    }
    print(as_text(result))
    if args.output is not None:
        write_results(result, args.output)
    for failure in failures:
        print(f"misa-eval: failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def check_arguments(args: argparse.Namespace) -> None:
    """Raise EvalError for what the command line alone shows to be wrong."""
    for name in ("lengths", "depths"):
        if getattr(args, name) == []:
            raise EvalError(f"--{name} names none: give numbers between commas")
    for depth in args.depths:
        if not 0 <= depth <= 100:
            raise EvalError(f"--depths {depth} is not a share of the text: choose 0 to 100 per cent")
    for length in args.lengths or []:
        if length < 1:
            raise EvalError(f"--lengths {length} is no length: choose a number of tokens")
    given = [args.needle_text, args.question, args.answer]
    if any(part is not None for part in given) and not all(given):
        raise EvalError("--needle-text, --question and --answer belong together: give all three, none of them empty")


def read_documents(files: Iterable[Path]) -> list[str]:
    """The texts of the files.

    Raises:
        EvalError: a file cannot be read as UTF-8 text or has none.
    """
    documents = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise EvalError(f"--text {file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise EvalError(f"--text {file} is not UTF-8 text") from None
        if not text.strip():
            raise EvalError(f"--text {file} is empty: name a file that holds text")
        documents.append(text)
    return documents


def lengths_within(lengths: list[int] | None, limit: int | None) -> list[int]:
    """The lengths asked for, or the powers of two that the model can take.

    Raises:
        EvalError: one is beyond the model's limit.
    """
    if lengths is None:
        longest = LONGEST if limit is None else min(limit, LONGEST)
        lengths = [2**i for i in range(SHORTEST.bit_length() - 1, longest.bit_length()) if 2**i <= longest]
        return lengths or [longest]
    if limit is not None and max(lengths) > limit:
        raise EvalError(f"--lengths {max(lengths)} is more than the model's {limit} tokens: choose at most {limit}")
    return sorted(set(lengths))


# ---------------------------------------------------------------- trials and prompts


def trials_of(args: argparse.Namespace, lengths: list[int]) -> Iterator[Trial]:
    """Deepest needle first: prompts of a length and seed share their text up to the needle, for the prefix cache."""
    for length in lengths:
        for seed in range(args.seed, args.seed + args.seeds):
            for depth in sorted(set(args.depths), reverse=True):
                if args.needle_text is None:
                    needle = draw_needle(random.Random(f"needle/{seed}/{length}/{depth}"))
                else:
                    needle = GivenNeedle(args.needle_text, args.question, args.answer)
                yield Trial(length, depth, seed, needle)


def build_prompts(builder: PromptBuilder, trials: list[Trial], answer_tokens: int) -> list[Prompt]:
    """One prompt per trial that leaves `answer_tokens` of its length to the answer.

    Raises:
        EvalError: a length has no room for any text.
    """
    prompts = []
    for trial in trials:
        tokens = trial.length - answer_tokens
        least = builder.overhead(trial.needle) + 1
        if tokens < least:
            raise EvalError(
                f"--lengths {trial.length} has no room for text: needle, question and {answer_tokens} tokens of answer "
                f"take all of it, choose at least {least + answer_tokens}"
            )
        prompts.append(builder.build(trial.needle, tokens, trial.depth / 100, f"text/{trial.seed}/{trial.length}"))
    return prompts


def answer_record(policy: str, trial: Trial, prompt: Prompt, answer: str) -> dict:
    """What is kept of one answer."""
    return {
        "policy": policy,
        "length": trial.length,
        "depth": trial.depth,
        "seed": trial.seed,
        "prompt_tokens": len(prompt.ids),
        "needle_at": prompt.needle_at,
        "exact_depth": round(100 * prompt.depth, 3),
        "expected": trial.needle.code,
        "answer": answer,
        "correct": trial.needle.is_answered_by(answer),
    }


# ---------------------------------------------------------------- offline engine


def answer_offline(
    args: argparse.Namespace,
    policy: str,
    prompts: list[Prompt],
    answer_tokens: int,
    receive: Callable[[int, str], None],
) -> None:
    """Answer all prompts by an engine under `policy`; `receive(number, text)` gets them as they come.

    Raises:
        EvalError: the engine refused the model or the options.
        engines.EngineFailure: it broke off.
    """
    longest = max(len(prompt.ids) for prompt in prompts) + answer_tokens
    plan = {
        "llm": {"max_model_len": longest} | engines.llm_arguments(args, policy),
        "max_tokens": answer_tokens,
        "at_once": args.concurrency,
        "count": len(prompts),
    }

    def leave_prompts(folder: Path) -> None:
        arrays = {str(i): np.asarray(prompt.ids, dtype=np.int32) for i, prompt in enumerate(prompts)}
        np.savez(folder / "prompts.npz", **arrays)

    engines.run_child(__name__, plan, lambda result: receive(result["number"], result["text"]), leave_prompts)


def serve_plan(folder: Path) -> None:
    """In the engine's process: answer the prompts that the parent left in `folder`."""
    plan = json.loads((folder / "plan.json").read_text())
    prompts, results = np.load(folder / "prompts.npz"), engines.Results(folder)
    engines.register_backend()
    from vllm import LLM, SamplingParams

    llm = LLM(**plan["llm"])
    sampling = SamplingParams(temperature=0, max_tokens=plan["max_tokens"])
    for start in range(0, plan["count"], plan["at_once"]):
        numbers = range(start, min(start + plan["at_once"], plan["count"]))
        batch = [{"prompt_token_ids": prompts[str(number)].tolist()} for number in numbers]
        for number, output in zip(numbers, llm.generate(batch, sampling, use_tqdm=False), strict=True):
            results.add(number=number, text=output.outputs[0].text)


# ---------------------------------------------------------------- server


class Server:
    """A running server with an OpenAI-compatible completions endpoint that takes token ids."""

    def __init__(self, url: str) -> None:
        """Ask what it serves.

        Raises:
            EvalError: it does not answer, or not as such a server does.
        """
        from openai import OpenAI, OpenAIError

        self.url = url.rstrip("/").removesuffix("/v1")
        if not re.match(r"https?://[^/]", self.url):
            raise EvalError(f"--url {url} is no address: give one such as http://localhost:8000")
        self.client = OpenAI(
            base_url=f"{self.url}/v1",
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            max_retries=RETRIES,
            timeout=REQUEST_TIMEOUT_S,
        )
        try:
            models = self.client.with_options(max_retries=0, timeout=30.0).models.list().data
        except (OpenAIError, ValueError) as error:
            raise EvalError(f"no OpenAI-compatible server answers at {self.url}: {report.one_line(error)}") from None
        if not models:
            raise EvalError(f"the server at {self.url} lists no model")
        self.model = models[0].id
        self.max_model_len: int | None = getattr(models[0], "max_model_len", None)
        """As vLLM tells it; None: the server does not say."""
        try:
            options = read_counters(self.url).options
        except (DemoError, OSError, ValueError):
            options = {}
        self.description = {"url": self.url, "model": self.model, "options": options}

    def policy(self, named: list[str] | None) -> str:
        """The server's policy, or the name the user gives to one that does not tell.

        Raises:
            EvalError: the names do not fit.
        """
        told = self.description["options"].get("policy")
        if named is not None and len(named) != 1:
            raise EvalError("a running server has one policy: leave out --policy, or leave out --url to run several")
        if named is not None and told not in (None, named[0]):
            raise EvalError(f"the server at {self.url} runs policy {told}, not {named[0]}: leave out --policy")
        return told or (named[0] if named else "server")

    def answer(
        self, prompts: list[list[int]], max_tokens: int, concurrency: int, receive: Callable[[int, str], None]
    ) -> None:
        """Answer prompts of token ids, `concurrency` at a time; `receive(number, text)` gets them as they come.

        Raises:
            EvalError: a request failed for good; no more are sent.
        """
        from openai import OpenAIError

        def ask(number: int) -> tuple[int, str]:
            completion = self.client.completions.create(
                model=self.model, prompt=prompts[number], max_tokens=max_tokens, temperature=0
            )
            return number, completion.choices[0].text

        with ThreadPoolExecutor(concurrency) as pool:
            requests = [pool.submit(ask, number) for number in range(len(prompts))]
            try:
                for request in as_completed(requests):
                    receive(*request.result())
            except (OpenAIError, AttributeError, IndexError, TypeError) as error:
                raise EvalError(f"the server at {self.url} did not answer: {report.one_line(error)}") from None
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


# ---------------------------------------------------------------- figures


def wilson_interval(correct: int, trials: int) -> tuple[float, float]:
    """95% confidence interval of a proportion (Wilson, 1927: the values whose score test does not reject)."""
    share, weight = correct / trials, CONFIDENCE_Z**2 / trials
    middle = share + weight / 2
    spread = CONFIDENCE_Z * math.sqrt(share * (1 - share) / trials + weight / (4 * trials))
    return max(0.0, (middle - spread) / (1 + weight)), min(1.0, (middle + spread) / (1 + weight))


def cells_of(answers: list[dict]) -> list[dict]:
    """Right answers of each policy, length and depth, with the interval; depth None: all depths together."""
    groups: dict[tuple, list[bool]] = {}
    for answer in answers:
        for depth in (answer["depth"], None):
            groups.setdefault((answer["policy"], answer["length"], depth), []).append(answer["correct"])
    cells = []
    for (policy, length, depth), correct in groups.items():
        low, high = wilson_interval(sum(correct), len(correct))
        cells.append(
            {
                "policy": policy,
                "length": length,
                "depth": depth,
                "trials": len(correct),
                "correct": sum(correct),
                "accuracy": sum(correct) / len(correct),
                "low": low,
                "high": high,
            }
        )
    return cells


def as_text(result: dict) -> str:
    """One row for each policy and length: all depths together, their interval, and the worst depth."""
    header = ["policy", "length", "right", "of", "accuracy", "95% interval", "worst depth"]
    rows = []
    for cell in result["cells"]:
        if cell["depth"] is not None:
            continue
        depths = [
            one
            for one in result["cells"]
            if (one["policy"], one["length"]) == (cell["policy"], cell["length"]) and one["depth"] is not None
        ]
        worst = min(depths, key=lambda one: (one["accuracy"], one["depth"]))
        rows.append([
            cell["policy"], str(cell["length"]), str(cell["correct"]), str(cell["trials"]), f"{cell['accuracy']:.1%}",
            f"{cell['low']:.1%} to {cell['high']:.1%}", f"{worst['depth']}%: {worst['accuracy']:.0%}",
        ])  # fmt: skip
    return "\n".join([headline(result), "", report.aligned_table(header, rows, left=1)])


def headline(result: dict) -> str:
    """Where the figures come from, in one line."""
    told, server = result["environment"], result["server"]
    where = told["hardware"] if server is None else f"server {server['url']} ({server['model']})"
    versions = ", ".join(f"{name} {told[name]}" for name in ("vllm", "torch", "misa_vllm", "commit"))
    return f"{where}, {versions}, {told['date']}"


def write_results(result: dict, folder: Path) -> None:
    """niah.json, and where matplotlib is one niah-POLICY.png for each policy; each whole or not at all."""
    report.write_text(folder / "niah.json", json.dumps(result, indent=1) + "\n")
    if not can_draw("heat maps"):
        return
    for policy in dict.fromkeys(cell["policy"] for cell in result["cells"]):
        with report.replacing(folder / f"niah-{policy}.png") as file:
            draw_heat_map(result, policy, file)


def draw_heat_map(result: dict, policy: str, file: Path) -> None:
    """Share of right answers over length (columns) and depth (rows, the text's beginning on top)."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    cells = {
        (cell["depth"], cell["length"]): cell
        for cell in result["cells"]
        if cell["policy"] == policy and cell["depth"] is not None
    }
    depths, lengths = (sorted(set(axis)) for axis in zip(*cells))
    shares = [[cells[depth, length]["accuracy"] for length in lengths] for depth in depths]
    size = 2.4 + 0.75 * len(lengths), 1.9 + 0.36 * len(depths)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for row, depth in enumerate(depths):
        for column, length in enumerate(lengths):
            axes.text(column, row, f"{100 * shares[row][column]:.0f}", ha="center", va="center", fontsize="small")
    axes.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth}%" for depth in depths])
    axes.set_xlabel("prompt and answer, tokens")
    axes.set_ylabel("depth of the needle")
    trials = max(cell["trials"] for cell in cells.values())
    low, _ = wilson_interval(trials, trials)
    arguments = result["arguments"]
    options = f" {json.dumps(arguments['options'])}" if arguments["options"] else ""
    title = f"{Path(arguments['model']).name}, policy {policy}{options}: right answers, per cent of {trials}"
    axes.set_title(f"{title} (all right: 95% interval from {low:.0%})", fontsize="small", wrap=True)
    figure.supxlabel(headline(result), fontsize=5, wrap=True)
    figure.colorbar(image, ax=axes)
    figure.savefig(file, dpi=150)


def _tokens(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)
