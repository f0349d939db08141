"""The training model computes what vLLM computes: RoPE conventions, norms, scales and the selection agree."""

import gc
import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from misa_vllm.models import tiny, trained  # noqa: E402
from misa_vllm.train.model import DENSE, SPARSE, DsaModel, ModelSize  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="float32 on GPUs has no sparse MLA kernel")

SIZE = ModelSize(
    layers=3, hidden=64, intermediate=96, heads=4, index_heads=8, topk=64, q_lora_rank=48, kv_lora_rank=96,
    nope_head_dim=32, rope_head_dim=32, v_head_dim=16, vocab=600, max_position=4096, rope_theta=5e4,
)  # fmt: skip
LENGTH = 400


def random_model() -> DsaModel:
    """Random weights sharp enough that attention looks at few tokens, and the indexer at its own ones."""
    model = DsaModel(SIZE)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                gain = 3.0 if "q_b_proj" in name or "embed" in name else 1.0
                parameter.copy_(noise * gain * parameter.shape[1] ** -0.5)
            elif "bias" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(1 + 0.3 * noise)
    return model


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported")
    tokenizer = path / "made.json"
    tiny.build_tokenizer(SIZE.vocab, tiny.TRAINING_TEXT.read_text(encoding="utf-8")).save(str(tokenizer))
    trained.write_model(path, model.state_dict(), SIZE.as_dict(), tokenizer, torch.float32)
    return path


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(20, 500, (LENGTH,), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def served(folder, prompt):
    """log P(token | those before) of every prompt token but the first, by vLLM."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        str(folder), attention_backend="misa", additional_config={"misa": {"policy": "dsa"}}, dtype="float32",
        max_model_len=1024, max_num_seqs=2, max_num_batched_tokens=1024, enforce_eager=True,
    )  # fmt: skip
    output = llm.generate(
        [{"prompt_token_ids": prompt.tolist()}],
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
        use_tqdm=False,
    )[0]
    pairs = zip(prompt.tolist(), output.prompt_logprobs, strict=True)
    found = [entry[token].logprob for token, entry in pairs if entry]
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return torch.tensor(found)


def log_probabilities(model, prompt, mode):
    with torch.no_grad():
        hidden, _ = model(prompt.unsqueeze(0), mode)
        logits = model.logits(hidden)[0, :-1]
    return logits.log_softmax(-1).gather(-1, prompt[1:].unsqueeze(-1)).squeeze(-1)


def test_sparse_mode_is_what_vllm_serves(model, prompt, served):
    difference = (log_probabilities(model, prompt, SPARSE) - served).abs()
    # an FP8 value on the edge between two may fall on the other side: then one token of 64 is another,
    # and random weights make much of it
    assert (difference < 1e-3).float().mean() > 0.95
    assert difference.median() < 1e-4


def test_selection_matters_here(model, prompt, served):
    """Control: what the test above measures would see a wrong selection."""
    difference = (log_probabilities(model, prompt, DENSE) - served).abs()
    assert difference[: SIZE.topk - 1].max() < 1e-3  # up to topk tokens all are selected
    assert (difference[SIZE.topk :] > 1e-2).float().mean() > 0.9
