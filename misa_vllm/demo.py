"""Serves a model with MISA, asks it about a long document and prints how fast and how faithful the selection was.

    python -m misa_vllm.demo MODEL [--needle] [--options '{"policy": "hierarchical"}'] [-- OPTIONS OF vllm serve]

With --needle it hides an access code somewhere in the document, asks for it and says whether the answer is right. The
recall is the share of exact DSA's tokens that MISA selected, taken by the engine itself on a sample of the
request's queries (option `audit_every`).
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from misa_vllm.processes import START_TIMEOUT_S, ServerError, free_port, running_server

DOCUMENT = Path(__file__).resolve().parent / "data" / "us_constitution.txt"
QUESTION = "Which amendment lowered the voting age to eighteen years? Answer in one sentence."
SERVED_NAME = "misa-demo"
AUDIT_EVERY = 16


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


def server_command(model: str, port: int, options: dict, arguments: list[str]) -> list[str]:
    """The `vllm serve` command line; `options` are MISA's, `arguments` are passed on."""
    audited = {"audit_every": AUDIT_EVERY, **options}
    return [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model),
        *("--attention-backend", "misa", "--host", "127.0.0.1", "--port", str(port)),
        *("--served-model-name", SERVED_NAME, "--additional-config", json.dumps({"misa": audited})),
        *arguments,
    ]


@dataclass(frozen=True)
class Counters:
    """What the engine says about its selection on `/metrics`."""

    options: dict[str, str]
    queries: dict[str, float]
    """Queries per layer, by path: all (at most k tokens visible), exact, routed."""
    audited: float
    recall_sum: float

    def since(self, before: "Counters") -> "Counters":
        """The counts made after `before` was read."""
        return Counters(
            self.options,
            {path: count - before.queries.get(path, 0) for path, count in self.queries.items()},
            self.audited - before.audited,
            self.recall_sum - before.recall_sum,
        )

    @property
    def recall(self) -> float | None:
        """Mean share of DSA's tokens that were selected; None if no query was compared."""
        return self.recall_sum / self.audited if self.audited else None


def parse_counters(exposition: str) -> Counters:
    """Read MISA's metrics from Prometheus' text format.

    Raises:
        DemoError: there are none.
    """
    from prometheus_client.parser import text_string_to_metric_families

    options, queries, totals = {}, {}, {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            if sample.name == "misa:config_info":
                options = dict(sample.labels)
            elif sample.name == "misa:queries_total":
                queries[sample.labels["path"]] = sample.value
            elif sample.name.startswith("misa:"):
                totals[sample.name] = sample.value
    if not options:
        raise DemoError("the server exports no misa metrics: serve with --attention-backend misa")
    audited = totals.get("misa:audited_queries_total", 0.0)
    return Counters(options, queries, audited, totals.get("misa:audited_recall_sum_total", 0.0))


def read_counters(url: str) -> Counters:
    """MISA's metrics of the server at `url`."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        return parse_counters(response.read().decode("utf-8"))


@dataclass(frozen=True)
class Answer:
    """One streamed answer and its timing, in seconds from the request."""

    prompt_tokens: int
    tokens: int
    first_token_s: float
    total_s: float
    text: str = ""

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed: tokens after the first over the time after the first."""
        return (self.tokens - 1) / max(self.total_s - self.first_token_s, 1e-9)


def ask(url: str, prompt: str, max_tokens: int, temperature: float = 0.7) -> Answer:
    """Send `prompt` as a chat message, print the answer while it streams.

    Raises:
        DemoError: the server refused the request or broke off.
    """
    from openai import OpenAI, OpenAIError

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=START_TIMEOUT_S)
    first, usage, parts, start = None, None, [], time.monotonic()
    try:
        stream = client.chat.completions.create(
            model=SERVED_NAME,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=max_tokens,
            temperature=temperature,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            usage = chunk.usage or usage
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.monotonic() - start
                parts.append(chunk.choices[0].delta.content)
                print(parts[-1], end="", flush=True)
    except OpenAIError as error:
        raise DemoError(f"the request failed: {error}") from None
    total = time.monotonic() - start
    print(flush=True)
    return Answer(usage.prompt_tokens, usage.completion_tokens, first or total, total, "".join(parts))


def report(answer: Answer, counted: Counters) -> str:
    """The figures of one request, one a line."""
    options, layer_queries = counted.options, sum(counted.queries.values())
    routed = counted.queries.get("routed", 0.0) / layer_queries if layer_queries else 0.0
    recall = "not sampled"
    if counted.recall is not None:
        recall = f"{counted.recall:.1%} (mean of {counted.audited:.0f} sampled queries)"
    return "\n".join(
        [
            f"prompt               {answer.prompt_tokens} tokens",
            f"time to first token  {answer.first_token_s:.2f} s "
            f"({answer.prompt_tokens / answer.first_token_s:.0f} prompt tokens/s)",
            f"answer               {answer.tokens} tokens, {answer.tokens_per_s:.1f} tokens/s",
            f"policy               {options['policy']}, pool block {options['pool_block']}",
            f"heads used           {options['active_heads']} of {options['index_heads']} "
            f"for {routed:.1%} of the queries, all heads for the others",
            f"recall against DSA   {recall}",
        ]
    )


def hidden_in(document: str, sentence: str, depth: float) -> str:
    """`document` with `sentence` between the two of its sentences nearest to `depth` (0 to 1)."""
    from misa_vllm.eval.haystack import split_sentences

    sentences = split_sentences(document)
    place = round(depth * len(sentences))
    return "".join([*sentences[:place], f" {sentence}", *sentences[place:]])


def has_random_weights(folder: Path) -> bool:
    """Whether `folder` holds a model of `misa_vllm.models.tiny`."""
    config = folder / "config.json"
    return config.exists() and json.loads(config.read_text(encoding="utf-8")).get("random_weights", False)


def _options(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object such as {{"policy": "misa"}}')
    return value


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="python -m misa_vllm.demo", description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a model's folder or name")
    parser.add_argument("--options", type=_options, default={}, help="MISA's options, a JSON object")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="a text file")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--needle", action="store_true", help="hide an access code in the document and ask for that")
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args(arguments[:cut])

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that the server is stopped
    log = Path(tempfile.mkdtemp(prefix="misa-demo-")) / "server.log"
    port = free_port()
    try:
        document, question = options.document.read_text(encoding="utf-8"), options.question
        temperature, needle = 0.7, None
        if options.needle:
            from misa_vllm.eval.needles import draw_needle

            needle, depth = draw_needle(random.Random()), random.uniform(0.1, 0.9)
            document = hidden_in(document, needle.sentence, depth)
            question, temperature = needle.chat_question, 0.0
        print(f"Serving {options.model} on port {port} (log: {log})", flush=True)
        command = server_command(options.model, port, options.options, arguments[cut + 1 :])
        with running_server(command, port, log) as url:
            before = read_counters(url)
            if needle:
                print(f"\nHidden {depth:.0%} into {options.document.name}: {needle.sentence}", flush=True)
            print(f"\nAsking about {options.document.name}: {question}\n", flush=True)
            answer = ask(url, f"{document}\n\n{question}", options.max_tokens, temperature)
            counted = read_counters(url).since(before)
    except (DemoError, ServerError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        if log.exists():
            print(f"The server's log: {log}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped, the server too", file=sys.stderr)
        return 130
    if has_random_weights(Path(options.model)):
        print("\nRandom weights: the words mean nothing, and a trained indexer's recall (paper: over 92%) is higher.")
    if needle:
        right = needle.is_answered_by(answer.text)
        print(f"\nThe answer is {'right' if right else f'WRONG: the code is {needle.code}'}.")
    print("\n" + report(answer, counted))
    return 0


if __name__ == "__main__":
    sys.exit(main())
