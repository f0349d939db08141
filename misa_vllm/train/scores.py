"""The indexer's scores of a block of queries, in plain PyTorch: for the selection, and differentiable for its loss."""

import torch


def index_scores(q: torch.Tensor, k: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """I [M, N] float32 of q [M, H, D], k [N, D] and gates [M, H] float32; no gradient."""
    products = torch.matmul(q, k.T).relu_()  # [M, H, N]
    gates = gates.to(products.dtype).unsqueeze(1)
    if products.dtype == torch.float32:
        return torch.bmm(gates, products).squeeze(1)
    # sums in bf16 would make thousands of tokens tie
    return torch.bmm(gates, products, out_dtype=torch.float32).squeeze(1)


def differentiable_scores(q: torch.Tensor, k: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """The same with gradients; sums in float32."""
    return torch.einsum("mh,mhn->mn", gates, torch.einsum("mhd,nd->mhn", q, k).relu().float())
