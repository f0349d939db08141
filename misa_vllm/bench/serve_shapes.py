"""Engines on a GPU: time to first token and decode speed of models with the shapes of DeepSeek-V3.2 and GLM-5.

Each model has 4 dense layers and random weights, made from a config.json alone; they are drawn so that activations keep
an ordinary size (vLLM's own dummy weights make index scores far smaller than any selection is made for). Every
engine runs in a process of its own, stock vLLM first and ours after it, on the same prompts. Time to first token is
that of one request with an empty prefix cache; decode speed is taken between the 2nd and the 66th token of requests
whose prompts are in the prefix cache. Medians of several runs each. "over stock" is the time of the stock engine over
the engine's.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from misa_vllm import processes
from misa_vllm.bench import decode_profile, report
from misa_vllm.bench.report import at_least

DEEPSEEK_V32 = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "num_hidden_layers": 4,
    # all layers are dense: these describe experts that no layer has
    "first_k_dense_replace": 4,
    "moe_layer_freq": 1,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GLM_5 = DEEPSEEK_V32 | {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 2048,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "index_n_heads": 32,
    "indexer_rope_interleave": True,
}
SHAPES = {"deepseek-v3.2": DEEPSEEK_V32, "glm-5": GLM_5}
"""Name -> config.json, less the maximum length."""

KERNELS = ("auto", "cuda", "triton")
POLICIES = ("misa", "hierarchical", "dsa")
DECODE_FROM, DECODE_TO = 2, 66
"""Decode is timed between these numbers of generated tokens."""
LEAST_S = 20
"""An engine is not started with less time than this left."""
FIRST_ORDINARY_TOKEN = 10


class OrdinaryWeights:
    """A method that vLLM adds to its worker (`worker_extension_cls`)."""

    def misa_draw_weights(self) -> None:
        """Replace the dummy weights: norms scale by one, matrices keep the size of what they multiply."""
        draw_weights(self.get_model())


@torch.inference_mode()
def draw_weights(model: torch.nn.Module) -> None:
    """Draw a model's parameters in place, where captured graphs read them."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


@dataclass(frozen=True)
class Engine:
    """What one child process measures."""

    shape: str
    policy: str | None
    """None: stock vLLM."""
    kernels: str
    contexts: list[int]
    decode_contexts: list[int]
    batches: list[int]
    repeats: int
    llm: dict = field(default_factory=dict)
    """Arguments of vLLM's `LLM` besides those that follow from the above."""
    options: dict = field(default_factory=dict)
    """The backend's options besides the policy."""
    profile: bool = False
    """Whether decode steps are profiled too."""

    @property
    def name(self) -> str:
        if self.policy is None:
            return "stock"
        return self.policy if self.kernels == "auto" else f"{self.policy} ({self.kernels})"

    @property
    def max_model_len(self) -> int:
        generated = max(DECODE_TO, decode_profile.TOKENS if self.profile else 0)
        longest = max([*self.contexts, *(context + generated for context in self.decode_contexts)])
        return -(-(longest + 1) // 64) * 64

    def llm_arguments(self, model: str) -> dict:
        arguments = {
            "model": model,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": self.max_model_len,
            "seed": 1,
            "enable_flashinfer_autotune": False,  # its kernels have no part in these models; saves a full step
            "worker_extension_cls": f"misa_vllm.bench.serve_shapes.{OrdinaryWeights.__qualname__}",
        } | self.llm
        if self.policy is not None:
            arguments["attention_backend"] = "misa"
            arguments["additional_config"] = {"misa": {"policy": self.policy, **self.options}}
        return arguments

    def environment(self) -> dict[str, str]:
        """The child's environment variables: the sampler that needs no compiler, the engine in the same process."""
        variables = dict(os.environ, VLLM_USE_FLASHINFER_SAMPLER="0", VLLM_ENABLE_V1_MULTIPROCESSING="0")
        if self.kernels != "auto":
            variables["MISA_KERNELS"] = self.kernels
        return variables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    count = at_least(1)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="models (default: both)")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=["misa"], help="ours (default: misa)")
    text = "our kernels, each in an engine of its own (default: auto, the fastest available)"
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=["auto"], help=text)
    text = 'the backend\'s other options, e.g. \'{"pool_block": 128}\''
    parser.add_argument("--options", type=json_object, default={}, metavar="JSON", help=text)
    text = "time to first token, tokens; none: not measured (default: 32768 131072)"
    parser.add_argument("--contexts", type=count, nargs="*", default=[32768, 131072], help=text)
    text = "decode: requests at a time; none: not measured (default: 1 8 32)"
    parser.add_argument("--batches", type=count, nargs="*", default=[1, 8, 32], help=text)
    text = "decode: tokens in each prompt (default: 32768)"
    parser.add_argument("--decode-contexts", type=count, nargs="+", default=[32768], help=text)
    parser.add_argument("--repeats", type=count, default=3, help="runs per median (default: %(default)s)")
    parser.add_argument("--chunk", type=count, default=8192, help="tokens per prefill step (default: %(default)s)")
    parser.add_argument("--kv-cache-dtype", default="auto", help="vLLM's option (default: %(default)s)")
    parser.add_argument("--tensor-parallel-size", type=count, default=1, help="GPUs (default: %(default)s)")
    text = "vLLM's option (default: %(default)s)"
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.7, help=text)
    text = "seconds until an engine is given up (default: %(default)s)"
    parser.add_argument("--timeout", type=count, default=1800, help=text)
    text = "seconds for all engines: none is started later, the one that runs then is given up (default: no limit)"
    parser.add_argument("--budget", type=count, help=text)
    text = "also take decode steps apart: wall time, GPU time, launches, kernels by time (one GPU)"
    parser.add_argument("--profile", action="store_true", help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there, after each engine")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the engines' logs there")


def json_object(text: str) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


def engines_of(args: argparse.Namespace) -> list[Engine]:
    """In the order in which they run: for each shape the stock engine, then ours."""
    batches = args.batches
    llm = {
        "max_num_seqs": max([1, *batches]),
        "max_num_batched_tokens": args.chunk,
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "kv_cache_dtype": args.kv_cache_dtype,
        "tensor_parallel_size": args.tensor_parallel_size,
    }
    if not (args.contexts or batches):
        raise report.BenchmarkError("nothing to time: name --contexts or --batches")
    if args.profile and args.tensor_parallel_size > 1:
        raise report.BenchmarkError("--profile sees one process: leave out --tensor-parallel-size")
    decode_contexts = args.decode_contexts if batches else []
    sizes = (args.contexts, decode_contexts, batches, args.repeats, llm)
    engines = []
    for shape in args.shapes:
        engines.append(Engine(shape, None, "auto", *sizes, profile=args.profile))
        engines += [
            Engine(shape, policy, kernels, *sizes, args.options, args.profile)
            for policy in args.policies
            for kernels in args.kernels
        ]
    return engines


def run(args: argparse.Namespace) -> int:
    report.require_writable(args.json, args.logs / "log" if args.logs else None)
    engines = engines_of(args)
    report.require_gpu()
    result = {
        "benchmark": "serve-shapes",
        "arguments": report.plain(vars(args)),
        "environment": None,
        "engines": [],
        "rows": [],
        "failures": [],
    }
    begin = time.perf_counter()
    for engine in engines:
        start = time.perf_counter()
        title = f"{engine.shape}, {engine.name}"
        left = args.timeout if args.budget is None else min(args.timeout, args.budget - (start - begin))
        if left < LEAST_S:
            result["failures"].append(f"{title}: not started, --budget {args.budget} is spent")
            continue
        measured, problem = run_engine(engine, left, args.logs)
        print(f"{time.perf_counter() - start:6.1f} s  {title}", file=sys.stderr, flush=True)
        if problem is not None:
            result["failures"].append(f"{title}: {problem}")
            continue
        result["environment"] = measured.pop("environment")
        result["engines"].append({"shape": engine.shape, "engine": engine.name} | measured)
        result["rows"] = rows_of(result["engines"])
        if args.json:
            report.write_text(args.json, json.dumps(result, indent=1) + "\n")
    if result["engines"]:
        print(as_text(result))
        if args.json:
            report.write_text(args.json, json.dumps(result, indent=1) + "\n")
    for failure in result["failures"]:
        print(f"misa-bench: failed: {failure}", file=sys.stderr)
    return 1 if result["failures"] else 0


def run_engine(engine: Engine, timeout: float, logs: Path | None) -> tuple[dict | None, str | None]:
    """(what the engine's process measured, None), or (None, what went wrong). Its log goes to `logs` or is dropped."""
    with tempfile.TemporaryDirectory(prefix="misa-bench-") as name:
        folder = Path(name)
        (folder / "engine.json").write_text(json.dumps(asdict(engine)))
        command = [sys.executable, "-m", "misa_vllm.bench.serve_shapes", "--child", str(folder)]
        log = folder / "log"
        with log.open("wb") as output:
            problem = processes.run(command, timeout, output, env=engine.environment())
        if logs is not None:
            name = "".join(c if c.isalnum() else "-" for c in f"{engine.shape}-{engine.name}")
            report.write_text(logs / f"{name}.log", log.read_text(errors="replace"))
        if problem is not None:
            print(*processes.tail(log), sep="\n", file=sys.stderr)
            return None, problem
        return json.loads((folder / "result.json").read_text()), None


# ---------------------------------------------------------------- in the engine's process


def measure_engine(folder: Path) -> None:
    """Build the engine that `folder`/engine.json describes, measure it and write `folder`/result.json."""
    engine = Engine(**json.loads((folder / "engine.json").read_text()))
    model = folder / "model"
    model.mkdir()
    config = SHAPES[engine.shape] | {"max_position_embeddings": engine.max_model_len}
    (model / "config.json").write_text(json.dumps(config))

    from vllm import LLM, SamplingParams

    if engine.policy is not None:
        from misa_vllm.plugin import register

        register()  # vLLM does it itself where the package is installed
    start = time.perf_counter()
    llm = LLM(**engine.llm_arguments(str(model)))
    llm.collective_rpc("misa_draw_weights")
    started = time.perf_counter() - start

    def generate(prompts: list[dict], tokens: int) -> float:
        """Seconds until every request has that many tokens."""
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        if [len(output.outputs[0].token_ids) for output in outputs] != [tokens] * len(prompts):
            raise RuntimeError(f"the engine did not generate {tokens} tokens for each of {len(prompts)} prompts")
        return seconds

    first_token, decode, profiles = [], [], []
    if engine.contexts:
        generate([prompt(min(engine.contexts), seed=0)], 1)  # what is compiled at first use is not timed
    for context in engine.contexts:
        seconds = []
        for i in range(engine.repeats):
            llm.reset_prefix_cache()
            seconds.append(generate([prompt(context, seed=1 + i)], 1))
        first_token.append({"context": context, "seconds": seconds, "median_s": statistics.median(seconds)})
    for context in engine.decode_contexts:
        llm.reset_prefix_cache()
        prompts = [prompt(context, seed=1000 + i) for i in range(max(engine.batches))]
        generate(prompts, 1)
        for batch in engine.batches:
            generate(prompts[:batch], DECODE_FROM)
            steps = []
            for _ in range(engine.repeats):
                few, many = (generate(prompts[:batch], tokens) for tokens in (DECODE_FROM, DECODE_TO))
                steps.append((many - few) / (DECODE_TO - DECODE_FROM))
            median = statistics.median(steps)
            decode.append({"context": context, "batch": batch, "step_s": steps, "median_step_s": median})
            if engine.profile:
                sampling = SamplingParams(
                    temperature=0, max_tokens=decode_profile.TOKENS, ignore_eos=True, detokenize=False
                )
                profile = decode_profile.profile_decode(llm.llm_engine, prompts[:batch], sampling)
                mode = llm.llm_engine.vllm_config.compilation_config.cudagraph_mode
                profiles.append({"context": context, "cudagraph_mode": getattr(mode, "name", None)} | profile)
    result = {
        "start_s": started,
        "kernels": None,
        "first_token": first_token,
        "decode": decode,
        "profiles": profiles,
        "environment": report.environment(),
    }
    if engine.policy is not None:
        from misa_vllm.kernels import choose_kernels

        result["kernels"] = choose_kernels("cuda").__name__.rpartition(".")[2]
    (folder / "result.json").write_text(json.dumps(result))


def prompt(tokens: int, seed: int) -> dict:
    """A prompt of random tokens."""
    generator = random.Random(seed)
    vocabulary = DEEPSEEK_V32["vocab_size"]
    return {"prompt_token_ids": [generator.randrange(FIRST_ORDINARY_TOKEN, vocabulary) for _ in range(tokens)]}


# ---------------------------------------------------------------- as text


def rows_of(engines: list[dict]) -> list[dict]:
    """One row for each engine and measurement, with its ratio to the stock engine of the same shape."""
    rows = []
    for engine in engines:
        names = {"shape": engine["shape"], "engine": engine["engine"], "kernels": engine["kernels"]}
        for one in engine["first_token"]:
            times = one["seconds"]
            rows.append(names | {"measure": "first token", "batch": 1, "context": one["context"],
                                 "seconds": one["median_s"], "least_s": min(times), "most_s": max(times)})  # fmt: skip
        for one in engine["decode"]:
            times = one["step_s"]
            rows.append(names | {"measure": "decode", "batch": one["batch"], "context": one["context"],
                                 "seconds": one["median_step_s"], "least_s": min(times), "most_s": max(times),
                                 "tokens_per_s": one["batch"] / one["median_step_s"]})  # fmt: skip

    def key(row):
        return row["shape"], row["measure"], row["batch"], row["context"]

    stock = {key(row): row["seconds"] for row in rows if row["engine"] == "stock"}
    for row in rows:
        row["speedup"] = stock[key(row)] / row["seconds"] if key(row) in stock else None
    order = list(dict.fromkeys(map(key, rows)))
    return sorted(rows, key=lambda row: order.index(key(row)))


def as_text(result: dict) -> str:
    """The figures as an aligned table under one line that names the machine."""
    header = ["model", "measure", "batch", "context", "engine", "median", "least", "most", "tokens/s", "over stock"]
    cells = []
    for row in result["rows"]:
        unit, factor = ("s", 1) if row["measure"] == "first token" else ("ms", 1e3)
        cells.append([
            row["shape"], row["measure"], str(row["batch"]), str(row["context"]), row["engine"],
            *(f"{row[name] * factor:.3f} {unit}" for name in ("seconds", "least_s", "most_s")),
            f"{row['tokens_per_s']:.0f}" if "tokens_per_s" in row else "",
            "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
        ])  # fmt: skip
    args = result["arguments"]
    setting = (
        f"4 dense layers, random weights, chunks of {args['chunk']} tokens, KV cache {args['kv_cache_dtype']}, "
        f"tensor parallel {args['tensor_parallel_size']}, medians of {args['repeats']}"
    )
    lines = [report.headline(result["environment"]), setting, "", report.aligned_table(header, cells, left=2)]
    for engine in result.get("engines", ()):
        for one in engine.get("profiles", ()):
            title = f"{engine['shape']}, {engine['engine']}, batch {one['batch']}, {one['context']} tokens"
            lines += ["", f"decode step of {title}, {one['cudagraph_mode']} graphs:", *decode_profile.as_text(one)]
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "--child":
        sys.exit("run misa-bench serve-shapes")
    measure_engine(Path(sys.argv[2]))
