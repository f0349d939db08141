"""The small model: a folder that vLLM's ordinary loader takes."""

import json
import re
from dataclasses import replace

import pytest

from misa_vllm.models import tiny
from misa_vllm.models.folder import ARCHITECTURES
from misa_vllm.models.tiny import SMALLEST_VOCABULARY, TRAINING_TEXT, TinySize

SMALL = TinySize(layers=2, hidden=64, intermediate=64, heads=2, q_lora_rank=32, kv_lora_rank=64, vocab=512)


@pytest.fixture(scope="module", params=tuple(ARCHITECTURES))
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    tiny.write_model(path, replace(SMALL, architecture=request.param))
    return path


def test_vllm_reads_the_config(folder):
    from vllm.config import ModelConfig

    model = ModelConfig(model=str(folder), tokenizer_mode="hf")
    written = json.loads((folder / "config.json").read_text())
    family = next(a for a in ARCHITECTURES.values() if a.name == written["architectures"][0])
    assert model.architectures == [family.name]
    assert model.use_mla
    assert model.max_model_len == SMALL.max_position
    assert model.hf_text_config.index_n_heads == family.index_heads
    assert model.hf_text_config.index_topk == SMALL.topk
    assert getattr(model.hf_text_config, "indexer_rope_interleave", False) is family.interleaved_indexer_rope


def test_transformers_computes_with_every_weight(folder):
    """An independent implementation of the architectures finds each weight under its name, and no other."""
    transformers = pytest.importorskip("transformers")
    # by class, not by AutoModel: vLLM, once imported, maps deepseek_v32 to the configuration of V3
    architecture = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, info = architecture.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("We the People of the United States", return_tensors="pt").input_ids
    logits = model(ids).logits.float()
    assert logits.isfinite().all()
    # not constant: different tokens are predicted at different places, and sharply enough to be reproducible
    assert logits[0].argmax(-1).unique().numel() > 1
    assert 1.0 < logits.std() < 10.0


def test_tokenizer_gives_back_any_text(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in (TRAINING_TEXT.read_text(encoding="utf-8"), "", " ", "naïve 漢字 \U0001f600\r\n\t\x00"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_chat_template_marks_the_turns(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|><|user|>a<|assistant|>b<|end|><|user|>c<|assistant|>"
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == text
    assert len(ids) == 9, "each marker is one token"


def test_document_is_long_enough_for_the_demo():
    text = TRAINING_TEXT.read_text(encoding="utf-8")
    assert len(tiny.build_tokenizer(TinySize().vocab, text).encode(text).ids) >= 6000


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        tiny.write_model(tmp_path / name, replace(SMALL, seed=seed))
    first, second, other = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in "abc")
    assert first == second
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--layers", "0"], "layers is 0: choose 1 or more"),
        (["--topk", "-5"], "topk is -5: choose 1 or more"),
        (["--vocab", "100"], f"vocab is 100: choose at least {SMALLEST_VOCABULARY}"),
        (["--rope-head-dim", "31"], "choose an even number"),
        (["--index-head-dim", "32"], "choose at least 64"),
    ],
)
def test_bad_sizes_get_one_line(tmp_path, capsys, arguments, complaint):
    assert tiny.main([str(tmp_path / "model"), *arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_unwritable_folder_gets_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert tiny.main([str(tmp_path / "file")]) == 2
    assert re.fullmatch(r"[^\n]*File exists[^\n]*\n", capsys.readouterr().err)
