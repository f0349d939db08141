"""The trained model that the package carries: it is whole, reaches its goals, and answers under every policy."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from misa_vllm import demo
from misa_vllm.eval.needles import draw_needle
from misa_vllm.models import trained
from misa_vllm.train import card, evaluate, heldout
from misa_vllm.train.bpe import END, Encoder
from misa_vllm.train.model import DsaModel
from misa_vllm.train.size import DENSE, SPARSE, ModelSize
from misa_vllm.train.tasks import Corpus
from tests.engine.conftest import ON_DEVICE, ON_GPU, offline_engine

FIGURES = Path(card.__file__).parent / "results" / "figures_h200.json"
LARGEST_BYTES = 16_000_000


@pytest.fixture(scope="module")
def packed():
    return trained.read_packed(trained.PACKED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "trained"
    assert trained.main([str(path)]) == 0
    return str(path)


def test_it_is_of_the_plans_size_and_small_enough(packed):
    tensors, size = packed
    assert ModelSize(**size) == ModelSize()
    expected = DsaModel(ModelSize()).state_dict()
    assert {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in expected.items()}
    assert all(t.isfinite().all() for t in tensors.values())
    assert sum(file.stat().st_size for file in trained.PACKED.iterdir()) <= LARGEST_BYTES
    assert len(Encoder(trained.PACKED / trained.TOKENIZER)) == ModelSize().vocab


def test_measured_figures_reach_the_goals_and_stand_on_the_card():
    figures = json.loads(FIGURES.read_text())
    needles, perplexity = figures["needles"][SPARSE], figures["perplexity"]
    assert {2**i for i in range(10, 16)} <= set(map(int, needles))
    for cells in needles.values():
        assert len(cells) == len(evaluate.DEPTHS)
        assert all(right >= 0.95 * asked > 0 for right, asked in cells.values())
    for length, sparse in perplexity[SPARSE].items():
        assert sparse <= 1.02 * perplexity[DENSE][length]
        assert sparse < figures["ngram"]["trigram"] / 2 < figures["ngram"]["unigram"]
    text = (trained.PACKED / "README.md").read_text()
    for length, sparse in perplexity[SPARSE].items():
        assert f"| {length} tokens | {perplexity[DENSE][length]:.2f} | {sparse:.2f} |" in text


def test_it_finds_needles_by_exact_selection(packed):
    tensors, size = packed
    model = DsaModel(ModelSize(**size))
    model.load_state_dict(tensors)
    encoder = Encoder(trained.PACKED / trained.TOKENIZER)
    text = Corpus(np.array(encoder.encode(demo.DOCUMENT.read_text(encoding="utf-8")), np.uint16), encoder)
    found = evaluate.needle_accuracy(model, text, 768, SPARSE, 1, depths=(0.0, 0.6))
    assert found == {0.0: 1.0, 0.6: 1.0}


POLICIES = {"dsa": {}, "misa": {}, "hierarchical": {"candidates": 1024, "min_context": 0}}
"""Name -> options with which it does what it is named for in a prompt of 2048 tokens."""


@pytest.mark.parametrize("policy", POLICIES)
def test_it_answers_under_every_policy(folder, policy):
    """As the demo asks it, and as `misa-eval niah` does."""
    from vllm import SamplingParams

    document = demo.DOCUMENT.read_text(encoding="utf-8")[:7000]
    # vLLM would choose DeepSeek's own chat format for this architecture
    options = {"tokenizer_mode": "hf", "max_model_len": 4096, "max_num_seqs": 2, "enforce_eager": True, **ON_DEVICE}
    if not ON_GPU:
        options["dtype"] = "float32"
    needle = draw_needle(random.Random(policy))
    text = demo.hidden_in(document, needle.sentence, 0.4)
    asked = [{"role": "user", "content": f"{text}\n\n{needle.chat_question}"}]
    greedy = SamplingParams(temperature=0, max_tokens=32)
    with offline_engine(folder, {"policy": policy, **POLICIES[policy]}, **options) as llm:
        (chat,) = llm.chat(asked, greedy, use_tqdm=False)
        (plain,) = llm.generate([f"{text}\n\n{needle.question}"], greedy, use_tqdm=False)
    assert len(plain.prompt_token_ids) > 2048  # enough for routed heads and selected tokens
    assert needle.is_answered_by(chat.outputs[0].text)
    assert needle.is_answered_by(plain.outputs[0].text)


def test_held_out_text_comes_in_parts(tmp_path, capsys):
    encoder = Encoder(trained.PACKED / trained.TOKENIZER)
    documents = [encoder.encode(text) for text in ("One is first.", "Two follows: caf\u00e9.")]
    ids = [token for document in documents for token in (*document, encoder.ids[END])]
    np.array(ids, np.uint16).tofile(tmp_path / "heldout.bin")
    (tmp_path / "tokenizer.json").write_bytes((trained.PACKED / trained.TOKENIZER).read_bytes())
    (file,) = heldout.write(tmp_path, tmp_path / "texts", 1, len(ids))
    assert file.read_text(encoding="utf-8") == "One is first.\n\nTwo follows: caf\u00e9.\n\n"
    assert heldout.main([str(tmp_path), str(tmp_path / "texts"), "--parts", "2", "--tokens", str(len(ids))]) == 2
    assert "choose fewer" in capsys.readouterr().err
