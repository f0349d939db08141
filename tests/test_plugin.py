"""Registration: any letter case, any number of times, in any process, and invisible unless selected."""

import json
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import vllm
from vllm.config import AttentionConfig
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from misa_vllm import seam
from misa_vllm.plugin import register


def run_python(code: str, **environment) -> str:
    """Run code in a fresh process, return its last line of output."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("spelling", ["misa", "MISA", "Misa"])
def test_any_letter_case(spelling):
    register()
    assert AttentionConfig(backend=spelling).backend.name == "MISA"


def test_registering_twice_changes_nothing():
    register()
    members = list(AttentionBackendEnum.__members__)
    from vllm.platforms import current_platform

    method = type(current_platform).check_and_update_config
    register()
    assert list(AttentionBackendEnum.__members__) == members
    assert type(current_platform).check_and_update_config == method


def test_member_survives_a_process_that_has_not_loaded_plugins(tmp_path):
    register()
    file = tmp_path / "member"
    file.write_bytes(pickle.dumps(AttentionBackendEnum["MISA"]))
    name = run_python(
        f"""
        import pickle
        print(pickle.loads(open({str(file)!r}, "rb").read()).get_path())
        """,
        VLLM_PLUGINS="",
    )
    assert name == "misa_vllm.backend.MISABackend"


def test_loading_imports_no_model_code_and_starts_no_gpu():
    loaded = run_python(
        """
        import json, sys
        from misa_vllm.plugin import register
        register()
        import torch
        heavy = ["vllm.model_executor.models.deepseek_v2", "vllm.model_executor.layers.sparse_attn_indexer",
                 "vllm.models.deepseek_v32.attention", "misa_vllm.model", "misa_vllm.kernels"]
        print(json.dumps([name for name in heavy if name in sys.modules] + [torch.cuda.is_initialized()]))
        """,
        VLLM_PLUGINS="",
    )
    assert json.loads(loaded) == [False]


def test_other_vllm_versions_are_named(monkeypatch):
    assert seam.version_problem() is None
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    problem = seam.version_problem()
    assert "0.32" in problem and "0.33.1" in problem and "pip install vllm==0.32.0" in problem
    assert "\n" not in problem


def test_unsupported_version_is_said_and_leaves_vllm_alone(monkeypatch, caplog):
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    monkeypatch.setattr(seam, "register_backend", lambda: pytest.fail("registered under an unsupported version"))
    monkeypatch.setattr(vllm.logger.logging.getLogger("vllm"), "propagate", True)
    register()
    assert "misa is not available" in caplog.text


GENERATE = """
    import json, os
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    from vllm import LLM, SamplingParams

    llm = LLM({model!r}, load_format="dummy", skip_tokenizer_init=True, max_model_len=512, enforce_eager=True, seed=3)
    prompt = [(7 * i) % 250 for i in range(300)]
    out = llm.generate([{{"prompt_token_ids": prompt}}], SamplingParams(temperature=0, max_tokens=16, logprobs=1,
                       ignore_eos=True, detokenize=False))
    first = out[0].outputs[0]
    print(json.dumps([first.token_ids, first.cumulative_logprob]))
"""


def test_other_backends_generate_the_same_with_and_without_the_plugin(tmp_path):
    """A dense MLA model under the platform's own backend, in two processes."""
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 256, "hidden_size": 128,
        "intermediate_size": 256, "moe_intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1, "kv_lora_rank": 512, "q_lora_rank": 64,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = GENERATE.format(model=str(tmp_path))
    without = run_python(code, VLLM_PLUGINS="")
    with_plugin = run_python(code, VLLM_PLUGINS="misa")
    assert with_plugin == without
