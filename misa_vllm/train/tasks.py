"""Training sequences: real text with facts written into it, and questions about them further on.

Every sequence has a fixed number of tokens. Facts stand at ends of sentences anywhere in the text, questions anywhere
behind their fact, so a long sequence trains retrieval over every distance many times; in most of them the last
question closes the sequence, as an evaluation's prompt does. What a sequence holds depends on its seed alone.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from misa_vllm.eval.needles import ADJECTIVES, NOUNS, Needle, draw_needle
from misa_vllm.train.bpe import BOS, END, SPECIAL_TOKENS, Encoder

TEXT, NEEDLE, FACT, LOOKUP, VARIABLE, PASSAGE, REPEAT = range(7)
TASKS = ("text", "needle", "fact", "lookup", "variable", "passage", "repeat")
NOT_SCORED = 255  # task number of tokens that belong to no figure: questions, the facts themselves

WEIGHT_UNIT = 16  # of the stored loss weights: 16 is the weight of a token of text
PROMPT_WEIGHT = WEIGHT_UNIT // 4  # words of facts and questions, few and soon known
HIDDEN_WEIGHT = 0  # digits and words of a fact that nothing could foretell

FEW_PAIRS = 2
PAIR_TOKENS = 80  # about what a fact and its question take
AT_START, AT_END = 0.06, 0.03  # shares of facts before all text and behind all of it, depths 0 and 1 of an evaluation


@dataclass(frozen=True)
class Mix:
    """How sequences are made up."""

    inserted: float = 0.35
    """Largest share of a sequence that is not text."""
    plain: float = 0.15
    """Share of sequences that are text only."""
    answer_weight: float = 4.0
    """Loss weight of an answer's token; a token of text has 1."""
    most_pairs: int = 48
    """Facts asked about in one sequence."""
    few: float = 0.25
    """Share of sequences with at most `FEW_PAIRS` facts in nothing but text, as an evaluation's prompt is."""
    kinds: tuple[float, ...] = (0.0, 0.42, 0.2, 0.1, 0.1, 0.08, 0.1)
    """How often each of `TASKS` is drawn."""
    chat: float = 0.2
    """Share of sequences in the chat template's form."""
    drill: float = 0.0
    """Share of sequences that only repeat meaningless words: what teaches copying soonest."""


@dataclass(frozen=True)
class Sample:
    """One sequence of length + 1 tokens; entry i describes token i as what is to be predicted."""

    tokens: np.ndarray
    """uint16"""
    weights: np.ndarray
    """uint8, in units of 1 / `WEIGHT_UNIT`"""
    tasks: np.ndarray
    """uint8: for tokens of text and answers the index into `TASKS`, else `NOT_SCORED`"""


class Corpus:
    """Token ids of real text, and where sentences end in it."""

    def __init__(self, tokens: np.ndarray, encoder: Encoder) -> None:
        self.tokens, self.encoder = tokens, encoder
        names = {number: name for name, number in encoder.ids.items()}
        line = encoder.encode("\n")[0]
        ends = [name.endswith((".", "!", "?", '."', ".)")) or n == line for n, name in sorted(names.items())]
        self._ends_sentence = np.array(ends)
        self.words = [name[1:] for name in encoder.ids if name[0] == "\u0120" and name[1:].isalpha() and len(name) > 3]
        self.begin, self.end = encoder.ids[BOS], encoder.ids[END]
        self.user, self.assistant = encoder.ids["<|user|>"], encoder.ids["<|assistant|>"]

    @classmethod
    def read(cls, folder: Path, name: str = "train") -> "Corpus":
        """Read NAME.bin and tokenizer.json.

        Raises:
            OSError: a file is missing.
            ValueError: there is no text in it.
        """
        tokens = np.fromfile(folder / f"{name}.bin", dtype=np.uint16)
        if not len(tokens):
            raise ValueError(f"{folder / name}.bin is empty: make it with misa_vllm.train.corpus")
        return cls(tokens, Encoder(folder / "tokenizer.json"))

    def crop(self, rng: random.Random, count: int) -> np.ndarray:
        """`count` tokens in a row from anywhere; the text starts again after its end."""
        start = rng.randrange(len(self.tokens))
        if start + count <= len(self.tokens):
            return self.tokens[start : start + count]
        return np.resize(np.roll(self.tokens, -start), count)

    def sentence_ends(self, tokens: np.ndarray) -> np.ndarray:
        """Positions right behind the sentences of `tokens`, in order."""
        return np.flatnonzero(self._ends_sentence[tokens]) + 1


# ---------------------------------------------------------------- facts and their questions


@dataclass
class Piece:
    """Tokens to be written into a text, each with its weight and task."""

    tokens: list[int]
    weights: list[int]
    tasks: list[int]

    @classmethod
    def empty(cls) -> "Piece":
        return cls([], [], [])

    def add(self, tokens: list[int], weight: int, task: int = NOT_SCORED) -> "Piece":
        self.tokens += tokens
        self.weights += [weight] * len(tokens)
        self.tasks += [task] * len(tokens)
        return self

    def __len__(self) -> int:
        return len(self.tokens)


# {n}: the name of what is asked about, {v}: what is to be found. Fact, question, and how the answer begins.
PHRASES = (
    ("The {a} of the {n} is {v}.", "Question: What is the {a} of the {n}?\nAnswer: The {a} of the {n} is {v}."),
    ("The {a} of the {n} is {v}.", "Question: What is the {a} of the {n}?\nAnswer: {v}"),
    ("Remember that the {a} of the {n} is {v}.", "Q: Which {a} does the {n} have?\nA: {v}"),
    ("For the {n}, the {a} is {v}.", "What is the {a} of the {n}? The {a} of the {n} is {v}."),
    ("The {n} has the {a} {v}.", "As was said before, the {n} has the {a} {v}."),
    ("Note: {n} -> {v}.", "Look up the note. {n} -> {v}"),
    ("[{n}] {a}: {v}", "Recall [{n}] {a}: {v}"),
    ("{n} was given the {a} {v}.", "Question: Which {a} was {n} given?\nAnswer: {n} was given the {a} {v}."),
)
ATTRIBUTES = (
    "access code", "secret number", "serial number", "password", "key", "telephone number", "locker number",
    "code word", "account number", "magic word", "room number", "address", "price", "identifier", "label", "code",
)  # fmt: skip


# how lists of keys and values are written: before a key, between it and its value, behind that
LISTS = (("", ": ", "\n"), ('"', '": "', '",\n'), ("", " = ", "\n"), ("", "\t", "\n"))


def draw_name(rng: random.Random, corpus: Corpus, like: str | None) -> str:
    """A name of one to three words; with `like`, one that shares a word with it, so that half a match misleads."""
    if like and rng.random() < 0.4:
        words = like.split()
        words[rng.randrange(len(words))] = rng.choice(NOUNS if rng.random() < 0.5 else corpus.words)
        return " ".join(words)
    if rng.random() < 0.6:
        return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    return " ".join(rng.choice(corpus.words) for _ in range(rng.randint(1, 3)))


def draw_value(rng: random.Random, corpus: Corpus) -> str:
    kind = rng.random()
    if kind < 0.6:
        return "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 8)))
    if kind < 0.85:
        return " ".join(rng.choice(corpus.words) for _ in range(rng.randint(1, 3)))
    return "".join(rng.choice("0123456789abcdef") for _ in range(8))


class Writer:
    """Draws facts with their questions; the answers' loss weight is the mix's."""

    def __init__(self, corpus: Corpus, mix: Mix) -> None:
        self.corpus, self.encode = corpus, corpus.encoder.encode
        self.answer_weight = min(255, round(mix.answer_weight * WEIGHT_UNIT))

    def filled(self, template: str, value: str, task: int, *, answers: bool, lead: str) -> Piece:
        """`template` with `value` at its {v}, as an answer or as a fact; `lead` goes before it."""
        before, after = template.split("{v}")
        # a word's token includes the space before it
        if before.endswith(" "):
            before, value = before[:-1], f" {value}"
        piece = Piece.empty().add(self.encode(lead + before), PROMPT_WEIGHT)
        if answers:
            closing = after or "\n"
            return piece.add(self.encode(value), self.answer_weight, task).add(self.encode(closing), WEIGHT_UNIT)
        return piece.add(self.encode(value), HIDDEN_WEIGHT).add(self.encode(after), PROMPT_WEIGHT)

    def needle(self, needle: Needle, lead: str = " ", asked_after: str = "\n\n") -> tuple[list[Piece], Piece]:
        """A fact and its question in the very words that the evaluation uses."""
        fact = self.filled(needle.sentence.replace(needle.code, "{v}"), needle.code, NEEDLE, answers=False, lead=lead)
        return [fact], self.filled(f"{needle.question} {{v}}.", needle.code, NEEDLE, answers=True, lead=asked_after)

    def fact(self, rng: random.Random, phrase, attribute: str, name: str) -> tuple[list[Piece], Piece]:
        value = draw_value(rng, self.corpus)
        said, asked = (text.replace("{a}", attribute).replace("{n}", name) for text in phrase)
        lead = rng.choice((" ", "\n", "\n\n"))
        return [self.filled(said, value, FACT, answers=False, lead=lead)], self.filled(
            asked, value, FACT, answers=True, lead="\n\n"
        )

    def lookup(self, rng: random.Random, entries: int) -> tuple[list[Piece], Piece]:
        """A list of keys with values, and a question about one of them."""
        before, between, after = rng.choice(LISTS)
        fact = Piece.empty().add(self.encode("\n"), PROMPT_WEIGHT)
        pairs = [
            (draw_name(rng, self.corpus, None).replace(" ", "_"), draw_value(rng, self.corpus)) for _ in range(entries)
        ]
        for key, value in pairs:
            fact.add(self.encode(before), PROMPT_WEIGHT).add(self.encode(key), HIDDEN_WEIGHT)
            fact.add(self.encode(between), PROMPT_WEIGHT).add(self.encode(value), HIDDEN_WEIGHT)
            fact.add(self.encode(after), PROMPT_WEIGHT)
        key, value = rng.choice(pairs)
        question = rng.choice((
            f"Question: What is the value of {key}?\nAnswer:",
            f"Look up {key}.\nValue:",
            f"Find {before}{key}{between}",
        ))
        value = f" {value}" if question.endswith(":") else value
        asked = Piece.empty().add(self.encode("\n\n" + question), PROMPT_WEIGHT)
        asked.add(self.encode(value), self.answer_weight, LOOKUP).add(self.encode("\n"), WEIGHT_UNIT)
        return [fact], asked

    def variable(self, rng: random.Random) -> tuple[list[Piece], Piece]:
        """Assignments that hand a number on, and a question for the last variable's value."""
        hops = rng.choice((1, 1, 2, 2, 3))
        names = [f"{rng.choice('abcdefghijklmnopqrstuvwxyz')}{rng.randint(10, 99)}" for _ in range(hops)]
        value = "".join(rng.choice("0123456789") for _ in range(5))
        facts, given = [], value
        for name in names:
            fact = Piece.empty().add(self.encode("\nVAR"), PROMPT_WEIGHT).add(self.encode(f" {name}"), HIDDEN_WEIGHT)
            facts.append(fact.add(self.encode(" ="), PROMPT_WEIGHT).add(self.encode(f" {given}"), HIDDEN_WEIGHT))
            fact.add(self.encode("\n"), PROMPT_WEIGHT)
            given = f"VAR {name}"
        asked = f"\n\nQuestion: What is the value of VAR {names[-1]}?\nAnswer: VAR {names[-1]} ="
        question = Piece.empty().add(self.encode(asked), PROMPT_WEIGHT)
        question.add(self.encode(f" {value}"), self.answer_weight, VARIABLE).add(self.encode("\n"), WEIGHT_UNIT)
        return facts, question

    def passage(self, quoted: list[int], following: list[int]) -> Piece:
        """The question for what follows a sentence of the text."""
        question = Piece.empty().add(self.encode('\n\nQuestion: Which passage follows the sentence "'), PROMPT_WEIGHT)
        question.add(quoted, HIDDEN_WEIGHT).add(self.encode('"?\nAnswer:'), PROMPT_WEIGHT)
        return question.add(following, self.answer_weight, PASSAGE).add(self.encode("\n"), WEIGHT_UNIT)

    def repeat(self, passage: list[int]) -> Piece:
        """A passage of the text once more: its first tokens say which, the rest can be read there."""
        piece = Piece.empty().add(self.encode("\n\n"), PROMPT_WEIGHT).add(passage[:4], HIDDEN_WEIGHT)
        return piece.add(passage[4:], self.answer_weight // 2, REPEAT).add(self.encode("\n"), WEIGHT_UNIT)

    def chat_end(self, needle: Needle) -> Piece:
        """The question put and answered in the chat template's form."""
        corpus = self.corpus
        asked = f"\n\nWhat is the access code of the {needle.name}?"
        piece = Piece.empty().add([*self.encode(asked), corpus.assistant], PROMPT_WEIGHT)
        piece.add(self.encode("The access code of the"), WEIGHT_UNIT)
        # the name is copied from the question, and whoever gets it wrong looks for another code
        piece.add(self.encode(f" {needle.name}"), self.answer_weight, REPEAT).add(self.encode(" is"), WEIGHT_UNIT)
        piece.add(self.encode(f" {needle.code}"), self.answer_weight, NEEDLE)
        return piece.add([*self.encode("."), corpus.end], WEIGHT_UNIT)


# ---------------------------------------------------------------- sequences


def make_sample(corpus: Corpus, mix: Mix, length: int, seed: str, context: int = 0) -> Sample:
    """A sequence of exactly `length` + 1 tokens, whose questions all come behind its first `context`."""
    rng = random.Random(seed)
    total = length + 1
    chat = rng.random() < mix.chat
    if rng.random() < mix.drill:
        return _drill(corpus, rng, total)
    head = [corpus.begin] * (chat or rng.random() < 0.7) + [corpus.user] * chat
    if rng.random() < mix.plain:
        tokens = np.concatenate([np.array(head, np.uint16), corpus.crop(rng, total - len(head))])
        return Sample(tokens, np.full(total, WEIGHT_UNIT, np.uint8), np.zeros(total, np.uint8))

    writer = Writer(corpus, mix)
    most = rng.randint(1, FEW_PAIRS if rng.random() < mix.few else mix.most_pairs)
    # no more than so many facts take, or they would all stand at the front, and the text that fills up behind them
    budget = min(int((total - context) * mix.inserted), PAIR_TOKENS * most + 20)
    text = corpus.crop(rng, total)  # more than fits; cut once the pieces are known
    reach = total - budget - len(head)  # of the text: pieces are placed in this part
    earliest = context / reach  # of a question, as a share of it
    ends = corpus.sentence_ends(text[:reach])
    ends = np.concatenate([[0], ends]) if len(ends) else np.arange(reach)
    placed: list[tuple[int, int, Piece]] = []  # where in the text, order of drawing, what
    spans: list[tuple[int, int]] = []
    spent = 0
    needles: list[Needle] = []
    tail: Piece | None = None
    # all alike in most sequences, so that only the name tells facts apart
    alike = rng.random() < 0.6
    phrase, attribute, name = rng.choice(PHRASES), rng.choice(ATTRIBUTES), None
    for order in range(4 * most):
        if len(needles) >= most or order >= most:
            break
        kind = rng.choices(range(len(TASKS)), mix.kinds)[0]
        first = _place(rng)
        if kind == NEEDLE:
            needle = draw_needle(rng)
            if needles and rng.random() < 0.3:
                needle = Needle(f"{needles[-1].name.split()[0]} {rng.choice(NOUNS)}", needle.code)
            if any(needle.name == other.name for other in needles):
                continue
            needles.append(needle)
            facts, question = writer.needle(needle, rng.choice((" ", " ", "\n", "\n\n")))
        elif kind == FACT:
            if not alike:
                phrase, attribute = rng.choice(PHRASES), rng.choice(ATTRIBUTES)
            name = draw_name(rng, corpus, name)
            facts, question = writer.fact(rng, phrase, attribute, name)
        elif kind == LOOKUP:
            facts, question = writer.lookup(rng, rng.randint(3, max(3, min(24, budget // 24))))
        elif kind == VARIABLE:
            facts, question = writer.variable(rng)
        else:
            size = rng.randint(12, max(12, min(64, budget // 4)))
            start = int(ends[min(len(ends) - 1, int(first * len(ends)))])
            passage = text[start : start + size].tolist()
            if start + size >= reach:
                continue
            quoted = max(6, size // 3)
            question = writer.passage(passage[:quoted], passage[quoted:]) if kind == PASSAGE else writer.repeat(passage)
            facts = []
            first = (start + size) / reach
            spans.append((start, start + size))
        cost = sum(map(len, facts)) + len(question)
        if spent + cost > budget:
            if spent:
                break
            continue
        spent += cost
        # a chain of facts stands in order, so the first of them leaves room for the others
        places = sorted([first, *(_place(rng) for _ in facts[1:])])
        first = places[-1] if facts else first
        for place, fact in zip(places, facts, strict=False):
            placed.append((_end_at(ends, place, reach), order, fact))
        # a chat ends with the assistant's answer
        if tail is None and (kind == NEEDLE if chat else rng.random() < 0.7):
            tail = question
            if chat:
                tail, spent = writer.chat_end(needles[-1]), spent + 12
        else:
            later = rng.random() if rng.random() < 0.7 else rng.random() ** 3
            from_here = max(first, earliest)
            placed.append((_end_at(ends, from_here + (1 - from_here) * later, reach), 1000 + order, question))
    placed = [(_outside(spans, place), order, piece) for place, order, piece in placed]
    placed = [(place if place < reach else total, order, piece) for place, order, piece in placed]
    return _assembled(head, text, sorted(placed, key=lambda entry: entry[:2]), tail, total)


def _drill(corpus: Corpus, rng: random.Random, total: int) -> Sample:
    """Some random tokens over and over: all but the first round can be read further up."""
    period = rng.randint(8, max(8, total // 2))
    ordinary = range(len(SPECIAL_TOKENS), len(corpus.encoder))
    tokens = np.resize(np.array([rng.choice(ordinary) for _ in range(period)], np.uint16), total)
    weights, tasks = np.full(total, WEIGHT_UNIT, np.uint8), np.full(total, REPEAT, np.uint8)
    weights[: period + 1], tasks[: period + 1] = HIDDEN_WEIGHT, NOT_SCORED
    return Sample(tokens, weights, tasks)


def _place(rng: random.Random) -> float:
    """Where in the text something stands, 0 to 1; the very ends more often than chance has it."""
    edge = rng.random()
    return 0.0 if edge < AT_START else 1.0 if edge < AT_START + AT_END else rng.random()


def _end_at(ends: np.ndarray, place: float, reach: int) -> int:
    """The sentence end next behind the fraction `place` of the text, or the text's own."""
    number = int(np.searchsorted(ends, int(place * reach)))
    return int(ends[number]) if number < len(ends) else reach


def _outside(spans: list[tuple[int, int]], place: int) -> int:
    """`place`, or the end of the passages around it, which are to stay in one piece."""
    while around := [end for start, end in spans if start < place < end]:
        place = max(around)
    return place


def _assembled(head: list[int], text: np.ndarray, placed: list, tail: Piece | None, total: int) -> Sample:
    tail = tail or Piece.empty()
    room = total - len(head) - len(tail) - sum(len(piece) for _, _, piece in placed)
    assert room > 0, "pieces exceed their share of the sequence"
    text = text[:room]
    tokens, weights, tasks = [np.array(head, np.uint16)], [[WEIGHT_UNIT] * len(head)], [[NOT_SCORED] * len(head)]
    done = 0
    for place, _, piece in placed:
        part = text[done : max(done, place)]
        done += len(part)
        tokens += [part, np.array(piece.tokens, np.uint16)]
        weights += [np.full(len(part), WEIGHT_UNIT, np.uint8), piece.weights]
        tasks += [np.full(len(part), TEXT, np.uint8), piece.tasks]
    rest = text[done:]
    tokens += [rest, np.array(tail.tokens, np.uint16)]
    weights += [np.full(len(rest), WEIGHT_UNIT, np.uint8), tail.weights]
    tasks += [np.full(len(rest), TEXT, np.uint8), tail.tasks]
    return Sample(
        np.concatenate(tokens).astype(np.uint16),
        np.concatenate([np.asarray(part, np.uint8) for part in weights]),
        np.concatenate([np.asarray(part, np.uint8) for part in tasks]),
    )


def make_batch(corpus: Corpus, mix: Mix, length: int, count: int, seed: str, context: int = 0) -> Sample:
    """`count` sequences stacked: arrays of [count, length + 1]."""
    samples = [make_sample(corpus, mix, length, f"{seed}/{i}", context) for i in range(count)]
    return Sample(*(np.stack([getattr(s, name) for s in samples]) for name in ("tokens", "weights", "tasks")))


# ---------------------------------------------------------------- evaluation


def needle_prompt(corpus: Corpus, length: int, depth: float, seed: str) -> tuple[list[int], list[int]]:
    """A prompt of exactly `length` tokens with one needle at `depth` (0: first, 1: last), and its answer's tokens."""
    rng = random.Random(seed)
    writer = Writer(corpus, Mix())
    needle = draw_needle(rng)
    (fact,), question = writer.needle(needle)
    answer = writer.encode(f" {needle.code}")
    asked = question.tokens[: len(question) - len(answer) - 1]
    room = length - len(fact) - len(asked)
    if room < 1:
        raise ValueError(f"a prompt of {length} tokens has no room for a needle: choose at least {length - room + 1}")
    text = corpus.crop(rng, room)
    ends = np.concatenate([[0], corpus.sentence_ends(text)])
    place = int(ends[np.abs(ends - depth * room).argmin()])
    return [*text[:place].tolist(), *fact.tokens, *text[place:].tolist(), *asked], answer
