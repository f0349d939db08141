"""What a model in training can do: needles by length and depth, and perplexity, dense and with DSA's selection."""

import math

import numpy as np
import torch

from misa_vllm.train.model import DENSE, DsaModel
from misa_vllm.train.tasks import Corpus, needle_prompt

DEPTHS = tuple(i / 10 for i in range(11))
TOKENS_AT_ONCE = 65536


def autocast(device: torch.device):
    """bf16 products on GPUs; elsewhere everything is float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def needle_accuracy(
    model: DsaModel, corpus: Corpus, length: int, mode: str, seeds: int, depths=DEPTHS, seed: str = "eval"
) -> dict[float, float]:
    """Share of needles whose whole code is the likeliest continuation, by depth.

    The answer is given to the model token by token, which asks for the same as greedy decoding: the first wrong
    token is a wrong answer either way.
    """
    device = next(model.parameters()).device
    cases = [(depth, needle_prompt(corpus, length, depth, f"{seed}/{length}/{depth}/{i}"))
             for depth in depths for i in range(seeds)]  # fmt: skip
    found: dict[float, list[bool]] = {depth: [] for depth in depths}
    at_once = max(1, TOKENS_AT_ONCE // length)
    for start in range(0, len(cases), at_once):
        part = cases[start : start + at_once]
        tokens = torch.tensor([prompt + answer[:-1] for _, (prompt, answer) in part], device=device)
        answers = torch.tensor([answer for _, (_, answer) in part], device=device)
        with autocast(device):
            hidden, _ = model(tokens, mode)
            guessed = model.logits(hidden[:, -answers.shape[1] :]).argmax(-1)
        for (depth, _), right in zip(part, (guessed == answers).all(-1).tolist(), strict=True):
            found[depth].append(right)
    return {depth: sum(right) / len(right) for depth, right in found.items()}


@torch.no_grad()
def perplexity(model: DsaModel, tokens: np.ndarray, length: int, windows: int, mode: str = DENSE) -> float:
    """Perplexity per token of `windows` windows of `length` tokens, spread evenly over `tokens`."""
    device = next(model.parameters()).device
    windows = max(1, min(windows, (len(tokens) - 1) // length))
    starts = np.linspace(0, len(tokens) - 1 - length, windows).astype(int)
    total, at_once = 0.0, max(1, TOKENS_AT_ONCE // length)
    for i in range(0, windows, at_once):
        rows = np.stack([tokens[start : start + length + 1] for start in starts[i : i + at_once]]).astype(np.int64)
        batch = torch.from_numpy(rows).to(device)
        with autocast(device):
            hidden, _ = model(batch[:, :-1], mode)
            losses, _ = model.token_losses(hidden, batch[:, 1:])
        total += losses.double().sum().item()
    return math.exp(total / (windows * length))
