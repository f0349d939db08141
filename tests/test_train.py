"""Training of the small model: its data, its attention, its clock, and what it writes."""

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from misa_vllm import reference
from misa_vllm.eval.needles import CODE_DIGITS, draw_needle
from misa_vllm.models import tiny, trained
from misa_vllm.train import batches, checkpoint, corpus, evaluate, export, kernels, ngram, plot, tasks
from misa_vllm.train import model as model_module
from misa_vllm.train import run as run_module
from misa_vllm.train.__main__ import main as train_main
from misa_vllm.train.bpe import Encoder
from misa_vllm.train.model import (
    DsaModel,
    Past,
    concentration,
    divergence,
    rope_tables,
    select,
    sparse_attention,
    telling_tokens,
)
from misa_vllm.train.optim import orthogonal
from misa_vllm.train.plan import PLANS, Plan, Stage
from misa_vllm.train.run import Options, train
from misa_vllm.train.size import DENSE, SPARSE, ModelSize
from misa_vllm.train.tasks import HIDDEN_WEIGHT, NEEDLE, NOT_SCORED, PASSAGE, TASKS, TEXT, Corpus, Mix

SIZE = ModelSize(
    layers=2, hidden=32, intermediate=48, heads=2, index_heads=4, index_head_dim=32, topk=16, q_lora_rank=24,
    kv_lora_rank=32, nope_head_dim=8, rope_head_dim=16, v_head_dim=8, vocab=1024, max_position=4096, rope_theta=1e4,
)  # fmt: skip
MIX = Mix(inserted=0.6)


def parameters(model, of_indexers):
    return [parameter for name, parameter in model.named_parameters() if (".indexer." in name) == of_indexers]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A corpus folder made of the text that the package ships."""
    folder = tmp_path_factory.mktemp("corpus")
    text = tiny.TRAINING_TEXT.read_text(encoding="utf-8")
    tokenizer = corpus.train_tokenizer([text, corpus.task_words()], 1024)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = np.array(tokenizer.encode(text).ids, np.uint16)
    cut = len(ids) * 4 // 5
    ids[:cut].tofile(folder / "train.bin")
    ids[cut:].tofile(folder / "heldout.bin")
    return folder


@pytest.fixture(scope="session")
def text(data):
    return Corpus.read(data)


# ---------------------------------------------------------------- text and tokens


def test_plain_encoder_is_the_tokenizer(data):
    from tokenizers import Tokenizer

    tokenizer, encoder = Tokenizer.from_file(str(data / "tokenizer.json")), Encoder(data / "tokenizer.json")
    samples = [
        tiny.TRAINING_TEXT.read_text(encoding="utf-8"), "", " ", "a  b\n\n c\t1234 ", "naïve 漢字 \U0001f600\x00",
        draw_needle(random.Random(1)).sentence, "x=12;  y_z=[3.5]\r\n", "   \n  trailing   ",
    ]  # fmt: skip
    for sample in samples:
        assert encoder.encode(sample) == tokenizer.encode(sample).ids
        assert encoder.decode(encoder.encode(sample)) == sample


def test_digits_are_single_tokens_and_names_are_short(text):
    encode = text.encoder.encode
    assert len(encode(" 907142")) == 1 + CODE_DIGITS
    needle = draw_needle(random.Random(3))
    assert len(encode(f" {needle.name}")) == 2


def test_page_text_leaves_menus_out():
    page = "<head><title>T</title></head><nav>Menu</nav><h1>Head</h1><p>One\n  two&amp;<b>3</b></p><pre>a\n  b</pre>"
    assert corpus.clean(corpus.page_text(page)) == "Head\n\nOne two&3\n\na\n b\n".replace("\n b", "\n  b")


def test_repeated_paragraphs_go():
    drop = corpus.Deduplicator()
    paragraph = "This paragraph is long enough to count as one that was copied."
    assert paragraph in drop(f"{paragraph}\nshort\n")
    assert drop(f"{paragraph}\nshort\nother") == "short\nother"


def test_a_corpus_can_be_made_with_a_models_tokenizer(data, tmp_path, monkeypatch):
    text = tiny.TRAINING_TEXT.read_text(encoding="utf-8")
    found = [("a", text[i : i + 500]) for i in range(0, len(text), 500)]
    monkeypatch.setattr(corpus, "collect", lambda *_: (found, []))
    arguments = [str(tmp_path / "corpus"), "--tokenizer", str(data / "tokenizer.json")]
    assert corpus.main(arguments) == 0
    made = Corpus.read(tmp_path / "corpus")
    assert made.encoder.ids == Encoder(data / "tokenizer.json").ids and (tmp_path / "corpus/bundle.tar.xz").is_file()
    assert made.encoder.decode(made.tokens[:100]) in "".join(part for _, part in found)
    assert corpus.main([*arguments[:2], str(tmp_path / "none")]) == 2


# ---------------------------------------------------------------- tasks


@pytest.mark.parametrize("length", [64, 257, 2048])
def test_sequences_are_whole_and_depend_on_the_seed_alone(text, length):
    seen = set()
    for number in range(25):
        sample = tasks.make_sample(text, MIX, length, f"s/{number}")
        again = tasks.make_sample(text, MIX, length, f"s/{number}")
        for name in ("tokens", "weights", "tasks"):
            values = getattr(sample, name)
            assert values.shape == (length + 1,)
            assert np.array_equal(values, getattr(again, name))
        assert sample.tokens.max() < len(text.encoder)
        assert set(sample.tasks.tolist()) <= {*range(len(TASKS)), NOT_SCORED}
        seen.add(sample.tokens.tobytes())
    assert len(seen) == 25


def test_every_answer_can_be_read_further_up(text):
    """The tokens of each answer stand before its question too, and nothing that cannot be known is trained on."""
    answered = dict.fromkeys(range(1, len(TASKS)), 0)
    for number in range(60):
        sample = tasks.make_sample(text, replace(MIX, drill=0.05), 768, f"a/{number}")
        string = text.encoder.decode
        for task in answered:
            places = np.flatnonzero(sample.tasks == task)
            if not len(places) or task == tasks.REPEAT:
                continue
            for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
                answer = string(sample.tokens[run]).strip()
                before = string(sample.tokens[: run[0]])
                assert answer in before
                assert (sample.weights[run] > sample.weights[sample.tasks == TEXT].max(initial=0)).all()
                answered[task] += 1
    assert all(answered[task] > 1 for task in answered if task != tasks.REPEAT)


def test_needles_use_the_words_of_the_evaluation(text):
    for number in range(40):
        mix = Mix(inserted=0.8, plain=0, chat=0, kinds=(0, 1, 0, 0, 0, 0, 0))
        sample = tasks.make_sample(text, mix, 256, f"n{number}")
        string = text.encoder.decode(sample.tokens)
        places = np.flatnonzero(sample.tasks == NEEDLE)
        code = text.encoder.decode(sample.tokens[places[:7]]).strip()
        assert len(code) == CODE_DIGITS
        name = string.split("Question: What is the access code of the ")[1].split("?")[0]
        assert f"The access code of the {name} is " in string.split("Question:")[0]
        assert f"?\nAnswer: The access code of the {name} is {code}." in string
        # the code itself cannot be foretold where it is hidden
        first = string.index(code)
        hidden = [i for i in range(len(sample.tokens)) if sample.weights[i] == HIDDEN_WEIGHT]
        assert text.encoder.decode(sample.tokens[hidden]).replace(" ", "").count(code) >= 1 and first > 0


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_prompts_have_their_length_and_the_needle_its_depth(text, depth):
    prompt, answer = tasks.needle_prompt(text, 500, depth, "p")
    assert len(prompt) == 500 and len(answer) == 1 + CODE_DIGITS
    string, code = text.encoder.decode(prompt), text.encoder.decode(answer).strip()
    assert string.endswith(" is") and string.count(code) == 1
    assert abs(string.index(code) / len(string) - depth * 0.9) < 0.15
    with pytest.raises(ValueError, match="choose at least"):
        tasks.needle_prompt(text, 30, 0.5, "p")


def test_questions_come_behind_the_context(text):
    for number in range(10):
        sample = tasks.make_sample(text, Mix(plain=0, inserted=0.6), 2048, f"c/{number}", context=1536)
        asked = np.flatnonzero((sample.tasks != TEXT) & (sample.tasks != NOT_SCORED))
        assert len(sample.tokens) == 2049 and len(asked) and asked[0] > 1536


def test_a_lone_needle_stands_at_every_depth(text):
    """Also before all text and right before the question, where an evaluation's first and last depths put it."""
    mix = Mix(plain=0, chat=0, few=1.0, kinds=(0, 1, 0, 0, 0, 0, 0))
    depths = []
    for number in range(150):
        sample = tasks.make_sample(text, mix, 2048, f"lone/{number}")
        answers = np.flatnonzero((sample.tasks == NEEDLE) & (np.roll(sample.tasks, 1) != NEEDLE))
        assert 1 <= len(answers) <= tasks.FEW_PAIRS
        hidden = np.flatnonzero((sample.weights == HIDDEN_WEIGHT) & (sample.tasks == NOT_SCORED))
        depths.append(hidden[0] / len(sample.tokens))
    assert np.mean(np.array(depths) < 0.02) > 0.03  # before all text: what chance would do once
    assert np.histogram(depths, 5, (0, 1))[0].min() > 8
    ended = [n for n in range(150) if _ends_with_its_needle(text, mix, f"lone/{n}")]
    assert ended


def test_chats_end_with_the_answer(text):
    for number in range(20):
        mix = Mix(inserted=0.6, plain=0, chat=1.0, few=0.5, kinds=(0, 1, 0, 0, 0, 0, 0))
        sample = tasks.make_sample(text, mix, 512, f"chat/{number}")
        corpus, tokens = text, sample.tokens.tolist()
        assert tokens[:2] == [corpus.begin, corpus.user] and tokens[-1] == corpus.end
        assert tokens.count(corpus.assistant) == 1
        turn = corpus.encoder.decode(tokens[tokens.index(corpus.assistant) + 1 :])
        assert turn.startswith("The access code of the ") and turn.endswith(".")
        assert turn.removesuffix(".") in corpus.encoder.decode(tokens[: tokens.index(corpus.assistant)])


def _ends_with_its_needle(text, mix, seed):
    string = text.encoder.decode(tasks.make_sample(text, mix, 2048, seed).tokens)
    fact, question = string.find("The access code"), string.find("Question:")
    return 0 < fact < question and string[fact:question].count(".") == 1 and string.endswith((".", ".\n"))


def test_passages_follow_their_sentence(text):
    mix = Mix(inserted=0.7, plain=0, chat=0, kinds=(0, 0, 0, 0, 0, 1, 0))
    sample = tasks.make_sample(text, mix, 512, "passage")
    places = np.flatnonzero(sample.tasks == PASSAGE)
    run = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)[0]
    string = text.encoder.decode(sample.tokens)
    quoted = string.split('follows the sentence "')[1].split('"?\nAnswer:')[0]
    assert quoted + text.encoder.decode(sample.tokens[run]) in string.split("Question:")[0]


def test_the_indexer_learns_where_answers_are(data):
    batches.start_worker(data)
    stage = Stage("s", 1.0, 256, 1024, kl_rows=20, mix=MIX)
    batch = batches.make(stage, "x", 4095)
    sample, rows = batch.sample, batch.rows
    assert np.array_equal(batch.positions, np.arange(256))
    assert sample.tokens.shape == (4, 257) and rows.shape == (4, 20)
    assert rows.min() >= 0 and rows.max() < 256
    targets = np.take_along_axis(sample.tasks[:, 1:], rows, axis=1)
    assert ((targets != TEXT) & (targets != NOT_SCORED)).sum() > 10
    made = next(batches.stream("seed", stage, 3, 4095))
    assert np.array_equal(made.sample.tokens, batches.make(stage, "seed/s/3", 4095).sample.tokens)


def test_positions_leap_within_the_models_reach():
    furthest = 0
    for seed in range(50):
        positions = batches.leaping(np.random.default_rng(seed), 64, 4095)
        steps = np.diff(positions)
        assert len(positions) == 64 and positions[0] == 0 and positions[-1] <= 4095
        assert steps.min() == 1 and (steps > 1).sum() <= 3
        furthest = max(furthest, positions[-1])
    assert furthest > 3000


def test_only_distances_matter(data):
    """Positions all further on by the same leave what the model computes as it was."""
    torch.manual_seed(1)
    model = DsaModel(SIZE)
    with torch.no_grad():
        for parameter in parameters(model, of_indexers=False):
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    tokens, positions = torch.randint(10, 600, (1, 40)), torch.arange(40)
    here, _ = model(tokens)
    assert torch.equal(here, model(tokens, positions=positions)[0])
    assert torch.allclose(here, model(tokens, positions=positions + 500)[0], atol=1e-3)
    assert not torch.allclose(here, model(tokens, positions=positions * 9)[0], atol=1e-2)


# ---------------------------------------------------------------- model


def index_inputs(model, length, batch=1):
    generator = torch.Generator().manual_seed(5)
    indexer = model.model["layers"][0].self_attn.indexer
    hidden = torch.randn(batch, length, SIZE.hidden, generator=generator)
    latent = torch.randn(batch, length, SIZE.q_lora_rank, generator=generator)
    return indexer, hidden, latent, rope_tables(SIZE, torch.arange(length))


@pytest.mark.parametrize("length", [5, 16, 17, 100])
def test_selection_is_the_references(length, monkeypatch):
    monkeypatch.setattr(kernels, "scored_at_once", lambda heads, device: 16 * length)  # several chunks
    torch.manual_seed(0)
    indexer, hidden, latent, rope = index_inputs(DsaModel(SIZE), length, batch=2)
    with torch.no_grad():
        keys = indexer.keys(hidden, rope)
        q, gates = indexer.queries(hidden, latent, rope)
        selected = select(indexer, hidden, latent, keys, rope)
    for row in range(2):
        score = reference.token_scores(q[row], gates[row], keys[row])
        for t in range(length):
            chosen = set(selected[row, t].tolist())
            assert len(chosen) == min(SIZE.topk, t + 1) and max(chosen) <= t
            # in chunks sums round differently, so of two nearly equal scores either may win
            best = score[t, : t + 1].topk(len(chosen)).values.sort().values
            assert torch.allclose(score[t, sorted(chosen)].sort().values, best, atol=1e-5)


def test_sparse_attention_is_attention_over_the_selected():
    generator = torch.Generator().manual_seed(1)
    length, topk = 40, 8
    q, k, v = (torch.randn(2, 3, length, 16, generator=generator, requires_grad=True) for _ in range(3))
    selected = torch.stack([
        torch.stack([torch.randperm(t + 1, generator=generator)[:topk].repeat(topk)[:topk] for t in range(length)])
        for _ in range(2)
    ]).to(torch.int32)  # fmt: skip
    out = sparse_attention(q, k, v, selected)
    for b in range(2):
        for t in range(0, length, 7):
            tokens = selected[b, t].unique().long()
            p = torch.softmax(torch.einsum("hd,hnd->hn", q[b, :, t], k[b][:, tokens]) / 4, -1)
            assert torch.allclose(out[b, :, t], torch.einsum("hn,hnd->hd", p, v[b][:, tokens]), atol=1e-5)
    out[:, :, 3].sum().backward()
    assert k.grad[:, :, 4:].abs().max() == 0  # later tokens do not matter


def test_divergence_is_zero_only_where_the_indexer_agrees():
    score = torch.tensor([[0.3, -1.0, 2.0, 9.0]])
    hidden = torch.tensor([[False, False, False, True]])
    target = score.masked_fill(hidden, -torch.inf).softmax(-1)
    assert divergence(target, score.masked_fill(hidden, -torch.inf), hidden).abs() < 1e-6
    other = torch.tensor([[0.2, 0.5, 0.3, 0.0]])
    expected = (other[0, :3] * (other[0, :3] / target[0, :3]).log()).sum()
    assert torch.allclose(divergence(other, score.masked_fill(hidden, -torch.inf), hidden), expected)


@pytest.mark.parametrize("full_kl", [False, True])
def test_the_indexer_learns_from_its_own_loss_alone(full_kl):
    torch.manual_seed(2)
    model = DsaModel(SIZE)
    tokens = torch.randint(10, 600, (2, 60))
    rows = torch.tensor([[3, 20, 59], [0, 30, 58]])
    hidden, kl = model(tokens, SPARSE, rows, full_kl)
    model.token_losses(hidden, tokens)[0].mean().backward(retain_graph=True)
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in parameters(model, of_indexers=True))
    model.zero_grad()
    kl.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters(model, of_indexers=True))
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in parameters(model, of_indexers=False))


@pytest.mark.parametrize("cast", [False, True])
def test_a_context_is_attended_to_and_not_trained(cast):
    """With topk over everything, tokens behind a context come out as in a whole sequence, and train every weight."""
    torch.manual_seed(2)
    model = DsaModel(replace(SIZE, topk=47))
    with torch.no_grad():
        for parameter in parameters(model, of_indexers=False):
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    tokens, rows = torch.randint(10, 600, (2, 48)), torch.tensor([[3, 15], [0, 12]])
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        whole, _ = model(tokens, SPARSE)
        part, kl = model(tokens, SPARSE, rows, False, 32)
        assert part.shape == (2, 16, SIZE.hidden)
        # the last token alone leaves one token out
        assert (part - whole[:, 32:])[:, :-1].abs().max() < (0.3 if cast else 1e-4)
        (model.token_losses(part, tokens[:, 32:])[0].mean() + kl).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    _, kl_of_whole = model(tokens, SPARSE, rows + 32, False)
    assert torch.allclose(kl, kl_of_whole, rtol=0.1 if cast else 1e-3)


def test_gates_start_positive():
    torch.manual_seed(5)
    model = DsaModel(SIZE)
    layer = model.model["layers"][0]
    x = layer.input_layernorm(model.model["embed_tokens"](torch.randint(10, 600, (200,))))
    latent = layer.self_attn.q_a_layernorm(layer.self_attn.q_a_proj(x))
    _, gates = layer.self_attn.indexer.queries(x, latent, rope_tables(SIZE, torch.arange(200)))
    assert (gates > 0).float().mean() > 0.9


def test_some_heads_look_back_from_the_start():
    """The probability that the first heads give the token 1, 2, ... places before, before any training."""
    torch.manual_seed(0)
    size = ModelSize()
    model = DsaModel(size)
    caught = {}
    plain = kernels.dense_attention
    layer = model.model["layers"][0]

    def keep(q, k, v):
        caught.setdefault("p", ((q @ k.mT) * size.head_dim**-0.5))
        return plain(q, k, v)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(kernels, "dense_attention", keep)
        x = model.model["embed_tokens"](torch.randint(0, size.vocab, (1, 300)))
        layer(x, rope_tables(size, torch.arange(300)), DENSE, None, False, Past())
    p = caught["p"].masked_fill(torch.ones(300, 300, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    for head in range(3):
        assert p[0, head].diagonal(-(head + 1))[50:].mean() > 0.9


def test_triton_scores_are_the_plain_ones():
    pytest.importorskip("triton")
    code = (
        "import torch; from misa_vllm.train import kernels, triton_scores;"
        "q, k, g = torch.randn(70, 4, 32), torch.randn(300, 32), torch.randn(70, 4);"
        "a, b = triton_scores.index_scores(q, k, g, 230), kernels.index_scores(q, k, g, 230);"
        "assert torch.equal(a.isinf(), b.isinf()) and (a - b).nan_to_num(0).abs().max() < 1e-3, 'they differ'"
    )
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()[-500:]


def test_index_queries_and_keys_are_of_one_type_under_autocast(monkeypatch):
    """The fused scores multiply them as they are."""
    seen = []
    plain = kernels.index_scores

    def keep(q, k, gates, first):
        seen.append((q.dtype, k.dtype))
        return plain(q, k, gates, first)

    monkeypatch.setattr(kernels, "index_scores", keep)
    model = DsaModel(replace(SIZE, topk=16))
    tokens = torch.randint(10, 600, (1, 48))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(tokens, SPARSE)
        model(tokens, SPARSE, None, False, 32)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}


def test_scores_are_summed_in_float32_under_autocast_too():
    generator = torch.Generator().manual_seed(3)
    q, k, gates = (torch.randn(*shape, generator=generator) for shape in ((5, 64, 16), (40, 16), (5, 64)))
    q, k = q.bfloat16(), k.bfloat16()
    exact = kernels.differentiable_scores(q.float(), k.float(), gates)
    with torch.autocast("cpu", torch.bfloat16):
        cast = kernels.differentiable_scores(q, k, gates)
        logits = kernels.attention_logits(q, k.expand(5, -1, -1))
    assert cast.dtype == logits.dtype == torch.float32
    # each product is rounded once, their sum is not
    assert (cast - exact).abs().max() < 2**-9 * exact.abs().max()
    assert torch.allclose(logits, torch.einsum("hmd,nd->hmn", q.float(), k.float()) / 4, atol=1e-5)


def test_the_fastest_right_kernels_are_taken_and_all_are_told(monkeypatch):
    for name in ("_scores_by", "_masked_by", "_dense_by"):
        monkeypatch.setattr(kernels, name, getattr(kernels, name))
    # a CPU has neither Triton's driver nor most of the attention kernels: what is left over is found
    lines = kernels.choose(torch.device("cpu"), 4, 8, 32, 32, 64, force=True)
    assert kernels._scores_by[0] == kernels.SUM and kernels._masked_by == kernels.PLAIN
    assert sum("FAILED" in line for line in lines) >= 3 and sum("is used" in line for line in lines) == 3
    lines.clear()
    with pytest.raises(RuntimeError, match="no code for x works here"):
        kernels._take("x", {"a": 1, "b": 2}, lambda candidate: None, lambda: math.nan, lambda: None, lines)
    assert all("WRONG" in line for line in lines) and len(lines) == 2


def test_muon_makes_updates_orthogonal():
    x = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonal(x))
    assert singular.min() > 0.5 and singular.max() < 1.3


# ---------------------------------------------------------------- plans and the loop


@pytest.mark.parametrize("name", list(PLANS))
def test_plans_are_sound(name):
    plan = PLANS[name]()
    plan.size.check()
    assert math.isclose(sum(stage.share for stage in plan.stages), 1.0)
    kinds = [(stage.mode, stage.train_model) for stage in plan.stages]
    assert kinds == sorted(kinds, key=[(DENSE, True), (DENSE, False), (SPARSE, True)].index)  # the report's order
    assert len({stage.name for stage in plan.stages}) == len(plan.stages)
    for stage in plan.stages:
        assert stage.tokens % stage.length == 0 and stage.length <= plan.size.max_position
        assert stage.train_model or stage.kl_rows
        assert stage.kl_rows <= stage.length - stage.context and (stage.mode == SPARSE or not stage.context)
    for number, stage in enumerate(plan.stages[:-1]):
        assert plan.stage_at(plan.progress_behind(stage.name)) == number + 1
    assert [plan.stage_at(p) for p in (0.0, 0.999999, 1.0)] == [0, len(plan.stages) - 1, len(plan.stages) - 1]
    assert plan.rate_at(0) == 1.0 and math.isclose(plan.rate_at(1.0), plan.final_rate)


def test_full_model_fits_the_gpu_path_and_the_repository():
    size = ModelSize()
    assert size.kv_lora_rank == 512 and size.rope_head_dim == 64 and size.index_head_dim == 128
    assert size.topk in (512, 1024, 2048) and size.heads % 2 == 0 and size.index_heads in (32, 64)
    tensors = DsaModel(size).state_dict()
    assert sum(t.numel() * t.element_size() for t in trained.pack(tensors).values()) < 11e6
    # a checkpoint and the text's bundle travel together
    assert sum(t.numel() for t in tensors.values()) * 2 < 25e6


SHORT_PLAN = Plan(
    SIZE,
    (
        Stage("dense", 0.5, 64, 256, skips=0.5, mix=MIX),
        Stage("warmup", 0.25, 64, 256, train_model=False, kl_rows=8, mix=MIX),
        Stage("sparse", 0.25, 128, 256, SPARSE, kl_rows=8, mix=MIX),
    ),
)


def run(data, out, **options):
    lines = []
    page = train(SHORT_PLAN, Options(data=data, out=out, steps=16, eval_needles=1, **options), log=lines.append)
    return page, lines


def test_a_resumed_run_goes_on_where_it_stopped(data, tmp_path):
    """Same batches, same number of steps per stage, and weights as close as fresh optimizers allow."""
    whole, _ = run(data, tmp_path / "whole")
    first, _ = run(data, tmp_path / "first", until=0.5)
    second, _ = run(data, tmp_path / "second", resume=tmp_path / "first")
    assert first["steps"] == 8 and second["steps"] == whole["steps"] == 16
    assert second["stage_steps"] == whole["stage_steps"] == {"dense": 8, "warmup": 4, "sparse": 4}
    assert second["tokens"] == whole["tokens"]
    first, second, whole = (
        torch.cat([p.flatten() for p in checkpoint.load(tmp_path / name)[0].state_dict().values()])
        for name in ("first", "second", "whole")
    )
    # the optimizers' memory is what is lost: the way from the start is mostly the same
    start = torch.cat([p.flatten() for p in fresh(SHORT_PLAN).state_dict().values()])
    assert (second - whole).norm() < 0.5 * (whole - start).norm()
    assert not torch.equal(first, second)


def fresh(plan):
    torch.manual_seed(batches.number_of(Options.seed) % 2**31)
    return DsaModel(plan.size)


def test_new_indexers_learn_beside_a_trained_model(data, tmp_path):
    run(data, tmp_path / "first", until=0.5)
    plan = Plan(SIZE, (Stage("index", 1.0, 64, 256, train_model=False, kl_rows=8, mix=MIX),))
    options = Options(data=data, out=tmp_path / "second", steps=4, resume=tmp_path / "first", new_indexers=True)
    page = train(plan, options, log=lambda _: None)
    assert page["progress"] == pytest.approx(1.0) and page["stage_steps"] == {"dense": 8, "index": 4}
    before, after = (checkpoint.load(tmp_path / name)[0].state_dict() for name in ("first", "second"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".indexer." in name for name in changed)
    assert {name for name in before if name.endswith("wq_b.weight")} <= changed
    with pytest.raises(ValueError, match="--resume"):
        train(plan, replace(options, resume=None))


def test_a_packed_model_gets_new_indexers(data, tmp_path, monkeypatch, capsys):
    """The command of the results' page, from what is shipped to what can be shipped."""
    torch.manual_seed(6)
    tensors = DsaModel(SIZE).state_dict()
    trained.write_packed(tmp_path / "packed", tensors, SIZE.as_dict(), data / "tokenizer.json")
    model, page = checkpoint.load(tmp_path / "packed")
    assert page["progress"] == 1.0 and page["steps"] == page["tokens"] == 0
    unpacked, _ = trained.read_packed(tmp_path / "packed")
    assert all(torch.equal(tensor, unpacked[name]) for name, tensor in model.state_dict().items())

    plan = Plan(SIZE, (Stage("index", 1.0, 64, 256, train_model=False, kl_rows=8, mix=MIX),))
    monkeypatch.setitem(PLANS, "indexer", lambda: plan)
    monkeypatch.setattr(evaluate, "KEPT_LENGTHS", (2048,))
    arguments = ["--plan", "indexer", "--new-indexers", "--resume", str(tmp_path / "packed"), "--data", str(data)]
    arguments += ["--out", str(tmp_path / "out"), "--minutes", "0.08", "--finish-seconds", "2", "--device", "cpu"]
    assert train_main([*arguments, "--concentrate", "0.1", "--log-seconds", "0"]) == 0
    model, page = checkpoint.load(tmp_path / "out")
    assert page["progress"] == pytest.approx(1.0) and set(page["stage_steps"]) == {"index"}
    for name, tensor in model.state_dict().items():
        if ".indexer." not in name:
            assert torch.equal(tensor, unpacked[name].half().float())
    steps, evaluations = plot.read(tmp_path / "out" / "curves.jsonl")
    assert all(1 <= step["heads"] <= SIZE.index_heads and 0 <= step["against"] <= 1 for step in steps)
    kept = [record["kept/2048"] for record in evaluations if "kept/2048" in record]
    assert len(kept) == 1 and len(kept[0]) == SIZE.layers and "kept by 8 heads" in capsys.readouterr().out

    other = json.loads((data / "tokenizer.json").read_text())
    other["model"]["vocab"] = {name: 1023 - number for name, number in other["model"]["vocab"].items()}
    (tmp_path / "packed" / "tokenizer.json").write_text(json.dumps(other))
    assert train_main(arguments) == 2 and "--tokenizer" in capsys.readouterr().err
    (tmp_path / "packed" / "size.json").write_text(json.dumps(replace(SIZE, hidden=64).as_dict()))
    with pytest.raises(ValueError, match="no whole packed model"):
        checkpoint.load(tmp_path / "packed")


def test_few_heads_count_where_training_wants_it(data):
    """Steps of the warm-up with and without the weight; gates keep arguing for tokens."""
    batches.start_worker(data)
    plan = PLANS["cpu"]()
    plan = replace(plan, size=replace(plan.size, layers=1))
    stage = replace(next(stage for stage in plan.stages if not stage.train_model), tokens=256)
    found = {}
    for weight in (0.0, 0.5):
        trainer = run_module.Trainer(plan, fresh(plan), torch.device("cpu"))
        trainer.model.model["layers"][0].self_attn.indexer.concentrate = weight
        trainer.prepare(stage)
        source = batches.stream("heads", stage, 0, plan.size.max_position - 1)
        for step in range(60):
            if step == 50:
                trainer.take_figures()
            trainer.step(stage, next(source), 1.0)
        found[weight] = trainer.take_figures()
    assert 1 <= found[0.5]["heads"] < 0.75 * found[0.0]["heads"] <= 0.75 * plan.size.index_heads
    assert found[0.5]["against"] < found[0.0]["against"] + 0.02 and found[0.5]["kl"] < found[0.0]["kl"] + 0.3


@pytest.mark.parametrize(("mode", "full_kl"), [(DENSE, False), (SPARSE, False), (SPARSE, True)])
def test_counting_heads_is_sound_and_free_of_side_effects(mode, full_kl, monkeypatch):
    torch.manual_seed(2)
    model = DsaModel(SIZE)
    tokens, rows = torch.randint(10, 600, (2, 60)), torch.tensor([[0, 0, 1], [0, 30, 58]])

    def gradients(weight):
        for layer in model.model["layers"]:
            layer.self_attn.indexer.concentrate = weight
        model.zero_grad()
        loss = model(tokens, mode, rows, full_kl)[1]
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in parameters(model, of_indexers=True)]

    loss, found = gradients(1.0)  # queries that see one token among them
    with torch.autocast("cpu", torch.bfloat16):
        cast, rounded = gradients(1.0)
    assert torch.allclose(cast, loss, rtol=0.05) and all(g.isfinite().all() for g in rounded)
    assert loss.isfinite() and all(g.isfinite().all() for g in found)
    plain, without = gradients(0.0)
    figures = torch.stack([layer.self_attn.indexer.figures for layer in model.model["layers"]])
    assert torch.equal(plain, figures[:, 0].mean()) and (figures[:, 1] >= 1).all()
    assert not all(map(torch.equal, found, without))
    monkeypatch.setattr(model_module, "concentration", lambda q, gates, keys: (gates.new_zeros(len(q)),) * 2)
    again, same = gradients(0.0)
    assert torch.equal(plain, again) and all(map(torch.equal, without, same))


def test_heads_count_by_what_they_tell_apart():
    generator = torch.Generator().manual_seed(3)
    q, keys = torch.randn(3, 4, 8, generator=generator), torch.randn(3, 50, 8, generator=generator)
    heads, against = concentration(q, torch.tensor([[1.0, 0, 0, 0], [1, 1, -1, -1], [0, -5, 0, 0]]), keys)
    assert heads[0] == pytest.approx(1, abs=1e-3) and 3 < heads[1] <= 4 and heads[2] == pytest.approx(1, abs=1e-3)
    assert against[0] == 0 and 0.2 < against[1] < 0.8 and against[2] == pytest.approx(1)
    # what a head gives to all tokens alike does not count
    keys[..., 0], q[:, 0] = 1.0, 0.0
    q[:, 0, 0] = 100.0
    assert concentration(q, torch.ones(3, 4), keys)[0].min() > 2
    target = torch.zeros(2, 300)
    target[0, 7] = target[0, 200] = 0.5
    target[1, 3] = 1.0
    tokens = telling_tokens(target, torch.tensor([300, 4]), None)
    assert tokens.shape == (2, 256) and (tokens[0, :64] == 7).all() and (tokens[0, 64:128] == 200).all()
    assert (tokens[1, :128] == 3).all() and tokens[0, 128:].diff().min() >= 2 and tokens[1].max() == 3


@pytest.mark.parametrize("cast", [False, True])
def test_all_heads_keep_all_tokens(text, cast, monkeypatch):
    monkeypatch.setattr(evaluate, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16, enabled=cast))
    torch.manual_seed(0)
    model, lines = DsaModel(SIZE), []
    arguments = model, text.tokens, (256, 512, 10**6)
    found = evaluate.kept_by_misa(*arguments, heads=SIZE.index_heads, pool_block=64, log=lines.append)
    assert found["kept/256"] == found["kept/512"] == [1.0] * SIZE.layers and len(found) == 4 and len(lines) == 2
    few = evaluate.kept_by_misa(*arguments, heads=1, pool_block=64, log=lines.append)
    assert all(0 < value < 1 for value in few["kept/256"]) and all(0 <= value <= 1 for value in few["negative/256"])
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model["layers"])


def test_training_learns_and_writes_curves(data, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "WARM_STEPS", 1)
    page, lines = run(data, tmp_path, log_seconds=0.0)
    steps, evaluations = plot.read(tmp_path / "curves.jsonl")
    assert len(steps) == 16 and page["progress"] == pytest.approx(1.0)
    assert np.mean([s["text"] for s in steps[6:8]]) < steps[0]["text"] - 0.1
    assert all(s["kl"] == 0 for s in steps[:8]) and all(s["kl"] > 0 for s in steps[8:])
    assert any("perplexity/sparse/128" in record for record in evaluations)
    files = [file for file in tmp_path.iterdir() if file.name.startswith("weights")]
    assert len(files) <= 3 and all(file.stat().st_size <= checkpoint.LARGEST_FILE for file in files)


def test_a_failed_evaluation_ends_no_training(data, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("no memory left\nand more")

    monkeypatch.setattr(run_module, "needle_accuracy", fail)
    page, lines = run(data, tmp_path)
    assert page["progress"] == pytest.approx(1.0)
    assert "EVALUATION FAILED, OutOfMemoryError: no memory left" in lines


@pytest.mark.parametrize("least", [1, 10**7])
def test_a_smoke_run_tells_whether_the_plan_fits(data, tmp_path, least):
    plan = replace(SHORT_PLAN, stages=tuple(replace(stage, least=least) for stage in SHORT_PLAN.stages))
    lines = []
    page = train(plan, Options(data=data, out=tmp_path, smoke=1, minutes=5, eval_needles=1), log=lines.append)
    assert page["fits"] == (least == 1)
    assert any(("DOES NOT FIT" if least > 1 else "the plan fits") in line for line in lines)
    record = json.loads((tmp_path / run_module.PREFLIGHT).read_text())
    assert [stage["stage"] for stage in record["stages"]] == ["dense", "warmup", "sparse"]
    assert all(stage["step_s"] > 0 and stage["evaluation_s"] > 0 for stage in record["stages"])


def test_training_needs_neither_vllm_nor_tokenizers():
    """Machines with a GPU to train on may have no more than PyTorch."""
    code = (
        "import sys; sys.modules.update(vllm=None, tokenizers=None, transformers=None, matplotlib=None);"
        "import misa_vllm.train.run, misa_vllm.train.evaluate, misa_vllm.train.export, misa_vllm.train.__main__"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert run.returncode == 0, run.stderr.decode()[-500:]


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    steps = [
        {"progress": i / 3, "text": 9.0 - i, "text_right": 0.1 * i, "kl": 0.1 * i, "stage": f"stage {i}"}
        for i in range(3)
    ]
    plot.draw(steps, [], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_the_clock_ends_a_run_in_time(data, tmp_path):
    lines = []
    options = Options(data=data, out=tmp_path, minutes=0.1, finish_seconds=2, until=0.3, eval_needles=1)
    page = train(SHORT_PLAN, options, log=lines.append)
    assert page["progress"] == pytest.approx(0.3, abs=0.02)
    assert set(page["stage_steps"]) == {"dense"}


# ---------------------------------------------------------------- what is written


def test_packed_form_is_the_model_up_to_rounding(data, tmp_path):
    torch.manual_seed(4)
    tensors = DsaModel(SIZE).state_dict()
    trained.write_packed(tmp_path / "packed", tensors, SIZE.as_dict(), data / "tokenizer.json")
    unpacked, size = trained.read_packed(tmp_path / "packed")
    assert ModelSize(**size) == SIZE and unpacked.keys() == tensors.keys()
    for name, tensor in tensors.items():
        step = tensor.abs().amax(dim=-1, keepdim=True) / trained.INT8_MAX
        assert ((unpacked[name] - tensor).abs() <= step * 0.5001).all()
    assert trained.main([str(tmp_path / "model"), "--packed", str(tmp_path / "packed")]) == 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["index_topk"] == SIZE.topk and config["rope_parameters"]["rope_theta"] == SIZE.rope_theta

    from safetensors.torch import load_file

    written = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])
    assert written["model.layers.0.self_attn.q_b_proj.weight"].dtype == torch.bfloat16


def test_a_checkpoint_is_the_model_up_to_float16(tmp_path):
    model = DsaModel(SIZE)
    checkpoint.save(tmp_path, model, {"tokens": 5, "weights": ["of an older checkpoint"]})
    loaded, page = checkpoint.load(tmp_path)
    assert page["tokens"] == 5 and all((tmp_path / name).is_file() for name in page["weights"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float())


def test_figures_fill_the_card(data, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "PERPLEXITY_LENGTHS", (128,))
    monkeypatch.setattr(evaluate, "ROUND_TOKENS", 128)
    page = {"tokens": 3_000_000, "steps": 7, "stage_steps": {"dense": 7}, "progress": 1.0}
    checkpoint.save(tmp_path / "c", fresh(SHORT_PLAN), page)
    ngram_file, figures = tmp_path / "ngram.json", tmp_path / "figures.json"
    ngram_file.write_text('{"unigram": 622.5, "trigram": 37.25}')
    arguments = [str(tmp_path / "c"), "--data", str(data), "--out", str(figures), "--lengths", "128"]
    arguments += ["--seconds", "0", "--tokens", "128", "--ngram", str(ngram_file), "--device", "cpu"]
    assert evaluate.main(arguments) == 0
    needles = json.loads(figures.read_text())["needles"]
    assert all(asked >= 1 for mode in (DENSE, SPARSE) for _, asked in needles[mode]["128"].values())
    split = {"documents": 1, "bytes": 2, "tokens": 3_000_000}
    sources = [{"source": "some-doc", "version": "1.2-3", "documents": 1, "bytes": 2}]
    (data / "corpus.json").write_text(json.dumps({"sources": sources, "train": split, "heldout": split}))
    arguments = [str(tmp_path / "c"), "--data", str(data), "--packed", str(tmp_path / "p"), "--figures", str(figures)]
    assert export.main(arguments) == 0
    card = (tmp_path / "p" / "README.md").read_text()
    assert "some-doc 1.2-3" in card and "622.5" in card and "| 128 | " in card and "3 M tokens" in card


def test_filling_behind_an_answer_changes_nothing(text, monkeypatch):
    torch.manual_seed(0)
    model, asked = DsaModel(SIZE), []
    whole = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: asked.append(whole(hidden)) or asked[-1])
    for multiple in (1, 64):
        monkeypatch.setattr(evaluate, "WHOLE", multiple)
        evaluate.needle_accuracy(model, text, 150, SPARSE, 1, (0.5,))
    assert torch.allclose(*asked, atol=1e-4) and asked[0].shape[1] == 1 + CODE_DIGITS


def test_export_compares_int8_with_float32(data, tmp_path, capsys):
    checkpoint.save(tmp_path, fresh(SHORT_PLAN), {"tokens": 0})
    assert export.main([str(tmp_path), "--data", str(data), "--compare", "--length", "64", "--windows", "4"]) == 0
    values = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(values) == 4 and abs(values[2] / values[0] - 1) < 0.01


def test_trigram_probabilities_sum_to_one():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 7, 400).astype(np.uint16)
    for pair in ([3, 5], [6, 6], [8, 8]):  # the last was never seen
        probabilities = [ngram.trigram_probabilities(train, np.array([*pair, c]), 9)[0] for c in range(9)]
        assert math.isclose(sum(probabilities), 1.0, rel_tol=1e-9) and min(probabilities) > 0
    periodic = np.tile(np.array([1, 2, 3, 4], np.uint16), 500)
    assert np.exp(-np.log(ngram.trigram_probabilities(periodic, periodic[:50], 5)).mean()) < 1.01
    assert math.isclose(ngram.unigram_perplexity(np.arange(8), np.arange(8), 8), 8.0)


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (train_main, ["--data", "{missing}", "--out", "{out}"], "tokenizer.json"),
        (train_main, ["--data", "{data}", "--out", "{out}", "--until", "2"], "--until"),
        (train_main, ["--data", "{data}", "--out", "{out}", "--concentrate", "-1"], "--concentrate"),
        (train_main, ["--data", "{data}", "--out", "{out}", "--until", "dense-2k"], "no stage dense-2k"),
        (evaluate.main, ["{missing}", "--data", "{data}", "--out", "{out}"], "checkpoint"),
        (export.main, ["{missing}", "--data", "{data}", "--figures", "{missing}", "--compare"], "--packed"),
        (train_main, ["--data", "{data}", "--out", "{out}", "--minutes", "0.1"], "--minutes"),
        (train_main, ["--data", "{data}", "--out", "{out}", "--resume", "{missing}"], "checkpoint"),
        (trained.main, ["{out}", "--packed", "{missing}"], "--packed"),
        (export.main, ["{missing}", "--data", "{data}", "--compare"], "checkpoint"),
        (export.main, ["{missing}", "--data", "{data}"], "nothing to do"),
        (plot.main, ["{data}/tokenizer.json", "{out}"], "curves"),
        (ngram.main, ["{missing}"], "train.bin"),
    ],
)
def test_bad_input_gets_one_line(data, tmp_path, capsys, main, arguments, said):
    places = {"data": data, "out": tmp_path / "out", "missing": tmp_path / "missing"}
    assert main([argument.format(**places) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error
