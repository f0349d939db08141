"""The card of the trained model: what it is, how it was made and what it can do, filled from the measured figures."""

import textwrap
from urllib.parse import unquote

from misa_vllm.train.size import DENSE, SPARSE


def write_card(size: dict, parameters: int, packed_bytes: int, figures: dict, corpus: dict) -> str:
    """The text of README.md.

    size: `ModelSize.as_dict()`; figures: what `misa_vllm.train.evaluate` wrote; corpus: corpus.json.
    """
    training = figures["training"]
    sources = ", ".join(sorted(f"{entry['source']} {unquote(entry['version'])}" for entry in corpus["sources"]))
    stages = ", ".join(f"{name} {steps}" for name, steps in training["stage_steps"].items())
    recipe = _filled(
        "`python -m misa_vllm.train`: dense attention first, then the indexer alone by KL divergence from the "
        "attention distribution, then everything with sparse attention (the recipe of DeepSeek-V3.2). "
        f"{training['steps']} steps, {training['tokens'] / 1e6:.0f} M tokens of text with facts and questions written "
        f"into it. Steps of the stages: {stages}. Curves, commands and hardware: `misa_vllm/train/results`."
    )
    if training.get("concentrate"):
        recipe += "\n\n" + _filled(
            "The indexers were then trained anew, alone (`--plan indexer --new-indexers`), with a loss that also asks "
            f"that few heads count for a query (`--concentrate {training['concentrate']}`): what this model says of "
            "policies holds for indexers whose heads divide the work, not for every DSA model."
        )
    text = _filled(
        "Text: documentation from Debian's main archive and Python's library, "
        f"{corpus['train']['tokens'] / 1e6:.1f} M tokens; {corpus['heldout']['tokens'] / 1e6:.2f} M tokens of other "
        f"documents were held out. Packages: {sources}."
    )
    return f"""# A small DSA model

`DeepseekV32ForCausalLM` with {parameters / 1e6:.1f} M parameters: {size["layers"]} layers, hidden size \
{size["hidden"]}, {size["heads"]} attention heads,
{size["index_heads"]} indexer heads of {size["index_head_dim"]} dimensions, top-{size["topk"]}, \
{size["max_position"]} positions, {size["vocab"]} tokens. It finds what a long English
text says and copies it; it knows nothing and cannot converse. It exists so that recall and retrieval of the selection
policies can be measured on an indexer that was trained.

`weights.safetensors` holds int8 matrices with one scale per row ({packed_bytes / 1e6:.1f} MB with the tokenizer);
`python -m misa_vllm.models.trained FOLDER` writes the Hugging Face folder that vLLM serves. Ask it in the words
of the evaluation (`misa_vllm/eval/needles.py`), in plain text or in the chat template.

## Training

{recipe}

{text}

## Figures

Of the int8 form, in `misa_vllm.train`'s own PyTorch code with exact DSA selection, held-out text;
{figures["machine"]}, torch {figures["torch"]}. Commands: `python -m misa_vllm.train.evaluate` and
`python -m misa_vllm.train.ngram`.

{_perplexities(figures)}

One needle, right answers of those asked at 11 depths (greedy, all six digits):

{_needles(figures["needles"])}
"""


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 118, break_on_hyphens=False, break_long_words=False)


def _perplexities(figures: dict) -> str:
    dense, sparse = (figures["perplexity"][mode] for mode in (DENSE, SPARSE))
    rows = ["| perplexity at | dense | DSA | DSA / dense |", "| --- | --- | --- | --- |"]
    rows += [f"| {n} tokens | {dense[n]:.2f} | {sparse[n]:.2f} | {sparse[n] / dense[n]:.4f} |" for n in dense]
    if figures.get("ngram"):
        unigram, trigram = (figures["ngram"][name] for name in ("unigram", "trigram"))
        rows.append(f"\nOn the same text a unigram model has {unigram:.1f}, a trigram model {trigram:.2f}.")
    return "\n".join(rows)


def _needles(needles: dict) -> str:
    rows = ["| tokens | DSA | worst depth | dense |", "| --- | --- | --- | --- |"]
    for length, cell in needles[SPARSE].items():
        depth = min(cell, key=lambda d: cell[d][0] / cell[d][1])
        dense = needles[DENSE].get(length)
        rows.append(
            f"| {length} | {_share(cell.values())} | {float(depth):.0%}: {cell[depth][0]} of {cell[depth][1]} | "
            f"{_share(dense.values()) if dense else 'not measured'} |"
        )
    return "\n".join(rows)


def _share(counts) -> str:
    right, asked = (sum(part) for part in zip(*counts, strict=True))
    return f"{right} of {asked}, {right / asked:.1%}"
