"""Sizes of the trained model, and the two kinds of attention; free of torch, so that batch makers start at once."""

from dataclasses import asdict, dataclass, fields

DENSE, SPARSE = "dense", "sparse"


@dataclass(frozen=True)
class ModelSize:
    """Sizes of the trained model.

    What the GPU path of vLLM 0.32.0 asks for: kv_lora_rank 512 with 64 RoPE dimensions (FlashMLA, FlashInfer SM90 and
    FlashAttention-3 sparse MLA), 128 index dimensions (one FP8 scale), top-k 512, 1024 or 2048 (the cooperative and
    persistent decode top-k). Eight heads divide by two ranks. Every head's query and key have 128 dimensions, so
    training takes the flash kernel once v is padded.
    """

    layers: int = 4
    hidden: int = 256
    intermediate: int = 448
    heads: int = 8
    index_heads: int = 64
    index_head_dim: int = 128
    topk: int = 512
    q_lora_rank: int = 128
    kv_lora_rank: int = 512
    nope_head_dim: int = 64
    rope_head_dim: int = 64
    v_head_dim: int = 64
    vocab: int = 4096
    max_position: int = 131072
    rope_theta: float = 1_000_000.0
    eps: float = 1e-6

    def check(self) -> None:
        """Raise ValueError, one line that says what to change, for a size no model can have."""
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}: choose a positive number")
        if self.rope_head_dim % 2 or self.index_head_dim < self.rope_head_dim:
            raise ValueError(
                f"rope_head_dim is {self.rope_head_dim}: choose an even number of at most {self.index_head_dim}"
            )

    @property
    def head_dim(self) -> int:
        return self.nope_head_dim + self.rope_head_dim

    def as_dict(self) -> dict:
        return asdict(self)
