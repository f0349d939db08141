"""MISA in a script, without a server: python examples/offline_llm.py [MODEL]"""

import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; on CPU vLLM otherwise asks for 92% of the memory

from vllm import LLM, SamplingParams


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else ".models/trained"
    small = model.startswith(".models/")  # brings its own tokenizer; other checkpoints keep vLLM's choice
    llm = LLM(
        model,
        attention_backend="misa",
        additional_config={"misa": {"policy": "hierarchical", "active_heads": 8}},
        **({"tokenizer_mode": "hf", "max_model_len": 8192, "dtype": "float32"} if small else {}),
    )
    prompts = ["We the People of the United States", "The right of citizens to vote"]
    for output in llm.generate(prompts, SamplingParams(max_tokens=32)):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":  # vLLM starts its workers by spawning this file
    main()
