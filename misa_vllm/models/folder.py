"""What a Hugging Face folder of a small DSA model holds besides weights and tokenizer."""

import json
from dataclasses import dataclass
from pathlib import Path

UNKNOWN, BOS, EOS = "<|unknown|>", "<|begin|>", "<|end|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = [UNKNOWN, BOS, EOS, *(f"<|{role}|>" for role in ROLES)]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Architecture:
    """What tells the two model families apart, as vLLM reads their config.json."""

    name: str
    model_type: str
    index_heads: int
    interleaved_indexer_rope: bool


ARCHITECTURES = {
    "deepseek": Architecture("DeepseekV32ForCausalLM", "deepseek_v32", 64, False),
    "glm": Architecture("GlmMoeDsaForCausalLM", "glm_moe_dsa", 32, True),
}


SIZES = {
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "nope_head_dim": "qk_nope_head_dim",
    "rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "index_heads": "index_n_heads",
    "index_head_dim": "index_head_dim",
    "topk": "index_topk",
    "max_position": "max_position_embeddings",
}
"""Our name of a size -> the field of config.json."""


def model_config(
    family: Architecture, vocab: int, mtp_layers: int = 0, rope_theta: float = 10000.0, eps: float = 1e-6, **sizes: int
) -> dict:
    """The contents of config.json; `sizes` are all of `SIZES`.

    All layers are dense: the experts play no part in sparse attention.
    """
    config = {
        "architectures": [family.name],
        "model_type": family.model_type,
        "dtype": "bfloat16",
        "vocab_size": vocab,
        "bos_token_id": SPECIAL_TOKENS.index(BOS),
        "eos_token_id": SPECIAL_TOKENS.index(EOS),
        **{field: sizes[name] for name, field in SIZES.items()},
        "num_nextn_predict_layers": mtp_layers,
        "num_key_value_heads": sizes["heads"],
        "first_k_dense_replace": sizes["layers"] + mtp_layers,
        "n_routed_experts": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": sizes["intermediate"],
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "rms_norm_eps": eps,
        "attention_bias": False,
        # vLLM's model builds an output matrix of its own in any case
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
    }
    if family.interleaved_indexer_rope:
        config["indexer_rope_interleave"] = True
    return config


def write_documents(folder: Path, config: dict) -> None:
    """Write the folder's JSON files: those of the tokenizer and of generation, and `config` as config.json."""
    documents = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "unk_token": UNKNOWN,
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
        "generation_config.json": {name: config[name] for name in ("bos_token_id", "eos_token_id")},
        # config.json last: it is what makes the folder a model, so an interrupted run leaves none
        "config.json": config,
    }
    for name, content in documents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
