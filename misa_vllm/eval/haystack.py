"""Long texts with a sentence hidden in them, to the exact token."""

import random
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from misa_vllm.eval.report import EvalError

SENTENCE_END = re.compile(r"""[.!?]['")\]]*(?=\s)|[。！？]|(?<=\S)(?=\s*\n\s*\n)""")
CLAUSE_END = re.compile(r"[;:,](?=\s)")
LONGEST_SENTENCE = 400
"""Characters after which a sentence is cut at a clause, or else at a word, so that a needle gets near its depth."""
PARAGRAPH = "\n\n"
PLACEHOLDER = "\N{SNOWMAN}haystack\N{SNOWMAN}"


class Tokenizer(Protocol):
    """What is asked of a Hugging Face tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def apply_chat_template(self, conversation, tokenize: bool, add_generation_prompt: bool) -> str: ...


class Needle(Protocol):
    """What is hidden and asked for; `misa_vllm.eval.needles.Needle` is one."""

    sentence: str
    question: str
    chat_question: str


@dataclass(frozen=True)
class Prompt:
    """A text of an exact length that holds a needle."""

    ids: list[int]
    needle_at: int
    """The needle's first token in `ids`."""
    depth: float
    """Share of the text before the needle, 0 to 1, as it came out at the nearest sentence end."""


def split_sentences(text: str) -> list[str]:
    """Cut `text` into sentences; each but the first begins with the white space before it, so they join to `text`."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    sentences = []
    for start, end in zip([0, *ends], [*ends, len(text)]):
        while end - start > LONGEST_SENTENCE:
            cut = _cut_within(text, start, start + LONGEST_SENTENCE)
            sentences.append(text[start:cut])
            start = cut
        sentences.append(text[start:end])
    return [sentence for sentence in sentences if sentence]


def _cut_within(text: str, start: int, end: int) -> int:
    """Where text[start:end] ends a clause last, or else a word, or else `end`."""
    clauses = [match.end() for match in CLAUSE_END.finditer(text, start, end)]
    space = text.rfind(" ", start + 1, end)
    return clauses[-1] if clauses else space if space > start else end


class Haystack:
    """Documents as tokens, sentence by sentence; a text that is longer than all of them goes through them again."""

    def __init__(self, documents: Sequence[str], tokenizer: Tokenizer) -> None:
        self.sentences: list[list[int]] = []
        for document in documents:
            # a document begins a paragraph of its own
            first, *others = split_sentences(document.strip()) or [""]
            tokens = [tokenizer.encode(text, add_special_tokens=False) for text in (PARAGRAPH + first, *others)]
            self.sentences += [sentence for sentence in tokens if sentence and first]
        self.tokens = sum(map(len, self.sentences))
        if not self.tokens:
            raise EvalError("the haystack has no text: name files with --text that hold some")

    def cut(self, length: int, rng: random.Random) -> tuple[list[int], list[int]]:
        """`length` tokens from the start of a random sentence on, and where in them sentences begin (0 first)."""
        start = rng.randrange(len(self.sentences))
        ids: list[int] = []
        begins = []
        while len(ids) < length:
            begins.append(len(ids))
            ids += self.sentences[(start + len(begins) - 1) % len(self.sentences)]
        if len(ids) == length:
            begins.append(length)
        return ids[:length], begins


class PromptBuilder:
    """Composes special tokens, haystack, needle and question.

    In a chat the text and the question are the user's message and the answer is the assistant's turn; otherwise the
    model continues the question.
    """

    def __init__(self, haystack: Haystack, tokenizer: Tokenizer, chat: bool) -> None:
        self.haystack = haystack
        self.tokenizer = tokenizer
        self.chat = chat
        if chat:
            message = [{"role": "user", "content": PLACEHOLDER}]
            try:
                text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            except ValueError as error:  # transformers: no template
                raise EvalError(f"the model's tokenizer has no chat template: leave out --chat ({error})") from None
            head, found, self.tail = text.partition(PLACEHOLDER)
            if not found:
                raise EvalError("the model's chat template changes the user's message: leave out --chat")
            self.head = tokenizer.encode(head, add_special_tokens=False)
        else:
            self.tail = ""
            self.head = _special_tokens_before(tokenizer)

    def overhead(self, needle: Needle) -> int:
        """Tokens of a prompt besides its text."""
        return sum(map(len, self._parts(needle)))

    def _parts(self, needle: Needle) -> tuple[list[int], list[int], list[int]]:
        sentence = self.tokenizer.encode(f" {needle.sentence}", add_special_tokens=False)
        asked = needle.chat_question if self.chat else needle.question
        question = self.tokenizer.encode(f"{PARAGRAPH}{asked}{self.tail}", add_special_tokens=False)
        return self.head, sentence, question

    def build(self, needle: Needle, tokens: int, depth: float, seed: str) -> Prompt:
        """A prompt of exactly `tokens` tokens, the needle between the two sentences nearest to `depth` (0 to 1).

        `seed` chooses where the text begins.

        Raises:
            EvalError: so few tokens leave no room for any text.
        """
        head, sentence, question = self._parts(needle)
        length = tokens - self.overhead(needle)
        if length < 1:
            raise EvalError(
                f"a prompt of {tokens} tokens has no room for text: needle and question take {tokens - length} tokens"
            )
        text, begins = self.haystack.cut(length, random.Random(seed))
        place = _nearest(begins, depth * length)
        ids = [*head, *text[:place], *sentence, *text[place:], *question]
        return Prompt(ids, len(head) + place, place / length)


def _nearest(ascending: list[int], value: float) -> int:
    """The entry nearest to `value`; of two as near the smaller."""
    i = bisect_left(ascending, value)
    return min(ascending[max(i - 1, 0) : i + 1], key=lambda entry: abs(entry - value))


def _special_tokens_before(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts in front of every text, such as a begin token."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    for start in range(len(whole)):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []
