"""Writes a small model of the DeepSeek-V3.2 or GLM-5 architecture as a complete Hugging Face folder.

    python -m misa_vllm.models.tiny .models/tiny

The weights are random (seeded), so it answers nonsense; everything else is real: vLLM's ordinary loader reads the
checkpoint, the tokenizer is trained on the text the package ships, the indexer has the shapes of the big models.
"""

import argparse
import math
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from misa_vllm.models.folder import ARCHITECTURES, SIZES, SPECIAL_TOKENS, model_config, write_documents

TRAINING_TEXT = Path(__file__).resolve().parent.parent / "data" / "us_constitution.txt"
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)  # every byte, so that any text has tokens

# Spread of the gates' sizes over the heads (standard deviation of their logarithm): trained indexers use their
# heads unequally, and a router has something to find only then.
GATE_SPREAD = 1.5
# Standard deviation of the index keys' common part, in units of a key's own spread: without one, the block means
# that the router reads are all but zero.
KEY_MEAN_STD = 1.0
# Standard deviation of the logits: one sharp enough that a sampled text does not jump between all tokens evenly.
LOGIT_STD = 3.0
# Attention logits of random weights are nearly equal; this much larger queries let it look at single tokens.
QUERY_GAIN = 3.0


@dataclass(frozen=True)
class TinySize:
    """Sizes of the model; the defaults run on two CPU cores."""

    architecture: str = "deepseek"
    layers: int = 2
    mtp_layers: int = 0
    """Layers behind these that draft further tokens (multi-token prediction), for speculative decoding."""
    hidden: int = 256
    intermediate: int = 512
    heads: int = 4
    """Attention heads."""
    index_heads: int = 0
    """H; 0 takes the family's own: 64 for deepseek, 32 for glm."""
    index_head_dim: int = 128
    topk: int = 256
    """k, tokens the indexer selects per query."""
    q_lora_rank: int = 128
    kv_lora_rank: int = 512
    nope_head_dim: int = 64
    rope_head_dim: int = 64
    v_head_dim: int = 64
    max_position: int = 131072
    vocab: int = 4096
    """Upper bound; the tokenizer may find fewer useful tokens."""
    embedding_rows: int = 0
    """Token ids the model takes, if more than the tokenizer has: `vllm bench latency` draws from the first 10000."""
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError, one line that says what to change, for a size no model can have."""
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture {self.architecture!r} is unknown: choose {' or '.join(ARCHITECTURES)}")
        for field in fields(self):
            value = getattr(self, field.name)
            may_be_zero = field.name in ("index_heads", "mtp_layers", "embedding_rows", "seed")
            if field.type is int and value < (0 if may_be_zero else 1):
                raise ValueError(f"{field.name} is {value}: choose {'0 or more' if may_be_zero else '1 or more'}")
        if self.vocab < SMALLEST_VOCABULARY:
            raise ValueError(f"vocab is {self.vocab}: choose at least {SMALLEST_VOCABULARY}, all bytes need a token")
        if self.rope_head_dim % 2:
            raise ValueError(f"rope_head_dim is {self.rope_head_dim}: choose an even number, RoPE turns pairs")
        if self.index_head_dim < self.rope_head_dim:
            raise ValueError(
                f"index_head_dim is {self.index_head_dim}, less than rope_head_dim {self.rope_head_dim}: "
                f"choose at least {self.rope_head_dim}, the indexer turns that much of a key"
            )

    @property
    def index_heads_resolved(self) -> int:
        return self.index_heads or ARCHITECTURES[self.architecture].index_heads


def build_tokenizer(vocab: int, text: str):
    """A byte-level BPE tokenizer of at most `vocab` tokens trained on `text`; the same input gives the same tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def config_of(size: TinySize, vocab: int) -> dict:
    """The contents of config.json."""
    sizes = {name: value for name, value in asdict(size).items() if name in SIZES}
    sizes["index_heads"] = size.index_heads_resolved
    config = model_config(ARCHITECTURES[size.architecture], vocab, size.mtp_layers, **sizes)
    return config | {"random_weights": True}


def weights(size: TinySize, vocab: int) -> Iterator[tuple]:
    """Yield (checkpoint name, tensor) of every weight, bfloat16 but for the indexer's key norm (float32)."""
    import torch

    def normal(name: str, *shape: int) -> torch.Tensor:
        # seeded by name: a weight does not change when others come or go
        generator = torch.Generator().manual_seed(zlib.crc32(f"{size.seed}/{name}".encode()))
        return torch.randn(shape, generator=generator)

    def random(name: str, rows: int, columns: int, gain: float = 1.0) -> tuple:
        return name, (normal(name, rows, columns) * (gain / math.sqrt(columns))).to(torch.bfloat16)

    def ones(name: str, count: int, dtype=torch.bfloat16) -> tuple:
        return name, torch.ones(count, dtype=dtype)

    heads, head_dim = size.heads, size.nope_head_dim + size.rope_head_dim
    index_heads = size.index_heads_resolved

    def decoder_layer(layer: int) -> Iterator[tuple]:
        block = f"model.layers.{layer}"
        attention = f"{block}.self_attn"
        yield ones(f"{block}.input_layernorm.weight", size.hidden)
        yield random(f"{attention}.q_a_proj.weight", size.q_lora_rank, size.hidden)
        yield ones(f"{attention}.q_a_layernorm.weight", size.q_lora_rank)
        yield random(f"{attention}.q_b_proj.weight", heads * head_dim, size.q_lora_rank, QUERY_GAIN)
        yield random(f"{attention}.kv_a_proj_with_mqa.weight", size.kv_lora_rank + size.rope_head_dim, size.hidden)
        yield ones(f"{attention}.kv_a_layernorm.weight", size.kv_lora_rank)
        up = heads * (size.nope_head_dim + size.v_head_dim)
        yield random(f"{attention}.kv_b_proj.weight", up, size.kv_lora_rank)
        yield random(f"{attention}.o_proj.weight", size.hidden, heads * size.v_head_dim)

        indexer = f"{attention}.indexer"
        yield random(f"{indexer}.wq_b.weight", index_heads * size.index_head_dim, size.q_lora_rank)
        yield random(f"{indexer}.wk.weight", size.index_head_dim, size.hidden)
        yield ones(f"{indexer}.k_norm.weight", size.index_head_dim, torch.float32)
        name = f"{indexer}.k_norm.bias"
        yield name, KEY_MEAN_STD * normal(name, size.index_head_dim)
        name, gates = random(f"{indexer}.weights_proj.weight", index_heads, size.hidden)
        spread = torch.exp(GATE_SPREAD * normal(f"{name}/spread", index_heads, 1))
        yield name, (gates * spread).to(torch.bfloat16)

        yield ones(f"{block}.post_attention_layernorm.weight", size.hidden)
        for projection in ("gate_proj", "up_proj"):
            yield random(f"{block}.mlp.{projection}.weight", size.intermediate, size.hidden)
        yield random(f"{block}.mlp.down_proj.weight", size.hidden, size.intermediate)

    embedding = random("model.embed_tokens.weight", vocab, size.hidden, math.sqrt(size.hidden))
    head = random("lm_head.weight", vocab, size.hidden, LOGIT_STD)
    yield embedding
    for layer in range(size.layers):
        yield from decoder_layer(layer)
    for layer in range(size.layers, size.layers + size.mtp_layers):
        # The model's first layer, given the newest token's embedding and the model's head: a draft that leaves out
        # what the other layers do, so it is right now and then.
        block = f"model.layers.{layer}"
        for name, tensor in decoder_layer(0):
            yield name.replace("model.layers.0", block), tensor
        yield f"{block}.embed_tokens.weight", embedding[1].clone()
        yield f"{block}.eh_proj.weight", torch.eye(size.hidden, 2 * size.hidden, dtype=torch.bfloat16)
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            yield ones(f"{block}.{norm}.weight", size.hidden)
        yield f"{block}.shared_head.head.weight", head[1].clone()
    yield ones("model.norm.weight", size.hidden)
    yield head


def write_model(folder: Path, size: TinySize) -> dict:
    """Write the model into `folder`, made if absent, and return what was written: token ids, parameters, bytes.

    Raises:
        ValueError: a size is out of range.
        OSError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    size.check()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(size.vocab, TRAINING_TEXT.read_text(encoding="utf-8"))
    vocab = max(tokenizer.get_vocab_size(), size.embedding_rows)
    tokenizer.save(str(folder / "tokenizer.json"))
    tensors = dict(weights(size, vocab))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_documents(folder, config_of(size, vocab))
    return {
        "vocabulary": vocab,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m misa_vllm.models.tiny", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    for name, default in asdict(TinySize()).items():
        choices = tuple(ARCHITECTURES) if name == "architecture" else None
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, choices=choices, help=f"default {default}")
    options = vars(parser.parse_args(arguments))
    folder = options.pop("folder")
    size = TinySize(**options)
    start = time.monotonic()
    try:
        written = write_model(folder, size)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(
        f"{folder}: {ARCHITECTURES[size.architecture].name}, {written['parameters'] / 1e6:.1f} M random parameters, "
        f"{size.layers} layers, {size.index_heads_resolved} indexer heads, top-{size.topk}, "
        f"{written['vocabulary']} tokens, {written['bytes'] / 1e6:.1f} MB, {time.monotonic() - start:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
