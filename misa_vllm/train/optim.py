"""Muon for the matrices of the layers, AdamW for everything else.

Muon (Jordan et al., 2024): the momentum of a matrix, made orthogonal by Newton-Schulz iterations, is its update.
Matrices of one shape are treated as one batch, because launches, not products, are what small matrices cost.
"""

import torch
from torch import nn

MOMENTUM = 0.95
ITERATIONS = ((3.4445, -4.7750, 2.0315),) * 5  # the quintic's coefficients, Jordan et al.
ADAM_BETAS = (0.9, 0.95)
# no matrices of a layer in the sense of Muon: the embedding's rows are independent, the gates' rows as well
NOT_FOR_MUON = ("embed_tokens", "weights_proj")


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """The nearest matrices [..., rows, columns] with singular values near one; bf16 on GPUs."""
    x = x.bfloat16() if x.is_cuda else x
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in ITERATIONS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Optimizer:
    """Both optimizers over the parameters that need a gradient; learning rates are set at every step."""

    def __init__(self, model: nn.Module, muon_rate: float, adam_rate: float, decay: float = 0.0) -> None:
        self.muon_rate, self.adam_rate, self.decay = muon_rate, adam_rate, decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        by_shape: dict[tuple, list[nn.Parameter]] = {}
        others = []
        for name, parameter in self.parameters.items():
            if parameter.dim() == 2 and not any(part in name for part in NOT_FOR_MUON):
                by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            else:
                others.append(parameter)
        self.stacks = list(by_shape.values())
        self.momentum = [torch.zeros((len(stack), *stack[0].shape), device=stack[0].device) for stack in self.stacks]
        fused = any(parameter.is_cuda for parameter in others)
        self.adam = torch.optim.AdamW(others, lr=adam_rate, betas=ADAM_BETAS, weight_decay=0.0, fused=fused)

    @torch.no_grad()
    def step(self, scale: float, clip: float = 1.0) -> torch.Tensor:
        """One update at `scale` times the learning rates; returns the gradient's norm before clipping."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0))
        for group in self.adam.param_groups:
            group["lr"] = self.adam_rate * scale
        self.adam.step()
        for stack, momentum in zip(self.stacks, self.momentum, strict=True):
            if stack[0].grad is None:
                continue
            gradient = torch.stack([p.grad for p in stack])
            momentum.lerp_(gradient, 1 - MOMENTUM)
            update = orthogonal(gradient.lerp(momentum, MOMENTUM))
            rows, columns = stack[0].shape
            rate = self.muon_rate * scale * max(1.0, rows / columns) ** 0.5
            for parameter, part in zip(stack, update, strict=True):
                parameter.mul_(1 - self.muon_rate * scale * self.decay).add_(part, alpha=-rate)
        for parameter in self.parameters.values():
            parameter.grad = None
        return norm
