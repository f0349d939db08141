"""Runs the real engine in this process on a small model with random weights, and records what was selected."""

import gc
import os
import random
from contextlib import ExitStack, contextmanager

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # on GPUs: the sampler that compiles nothing at first use

import pytest  # noqa: E402
import torch  # noqa: E402
import vllm.envs  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.model_executor.layers.linear import UnquantizedLinearMethod  # noqa: E402
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod  # noqa: E402

from misa_vllm.models import tiny  # noqa: E402
from tests.engine.recorder import Recorder  # noqa: E402

ON_GPU = torch.cuda.is_available()
# vLLM's own kernels on GPUs want a power of two they were built for, and the attention head counts of real models
TOPK = 512 if ON_GPU else 64
SIZES = {"heads": 64, "hidden": 512} if ON_GPU else {}
ON_DEVICE = (
    # every query goes through the indexer, also where stock would attend densely and score nothing
    {"attention_config": {"sparse_mla_force_mqa": True}, "gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2**31}
    if ON_GPU
    else {}
)


def write_model(folder, **sizes):
    """A model whose indexer selects few tokens, so that selection matters on short prompts."""
    tiny.write_model(folder, tiny.TinySize(**{"topk": TOPK, "vocab": 600, **SIZES, **sizes}))
    return str(folder)


@pytest.fixture(scope="session")
def deepseek_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "deepseek")


@pytest.fixture(scope="session")
def glm_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "glm", architecture="glm")


@contextmanager
def products_row_by_row():
    """Compute every matrix product of the model one row at a time.

    How a BLAS library rounds a row depends on how many rows it was given, so hidden states, and with them
    queries, would differ between prefill and decode before our code sees them.
    """

    def each_row(method):
        def apply(self, layer, x, bias=None):
            return torch.cat([method(self, layer, row, bias) for row in x.split(1)]) if len(x) else x

        return apply

    bmm = torch.bmm

    def bmm_each_row(left, right, *, out=None):
        out = left.new_empty(*left.shape[:2], right.shape[2]) if out is None else out
        for i in range(left.shape[1]):
            out[:, i : i + 1] = bmm(left[:, i : i + 1], right)
        return out

    with pytest.MonkeyPatch.context() as patch:
        for kind in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
            patch.setattr(kind, "apply", each_row(kind.apply))
        patch.setattr(torch, "bmm", bmm_each_row)
        yield


@pytest.fixture(scope="module", autouse=True)
def row_by_row_products():
    with products_row_by_row():
        yield


@contextmanager
def offline_engine(model: str, misa: dict | None, **options):
    """vLLM's `LLM`, stock (`misa` None) or under the backend with these options; it leaves nothing behind."""
    if misa is not None:
        options |= {"attention_backend": "misa", "additional_config": {"misa": misa}}
    if ON_GPU:  # it would run a full batch for kernels that these models do not have
        options.setdefault("enable_flashinfer_autotune", False)
    llm = LLM(model, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def allow_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process, which has had an engine, start one of several ranks.

    On a GPU, the first engine has made a fork of the process useless; on CPU each rank wants a memory node to itself.
    vLLM keeps the variables' values once it has an engine.
    """
    variable, value = (
        ("VLLM_WORKER_MULTIPROC_METHOD", "spawn") if ON_GPU else ("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    )
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(vllm.envs, variable, value, raising=False)


def greedy(llm: LLM, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """The prompts' greedy continuations."""
    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def agreement(one: list[int], other: list[int]) -> int:
    """How many leading tokens are the same: on GPUs attention's rounding may show in the next one."""
    return next((n for n, (left, right) in enumerate(zip(one, other)) if left != right), min(len(one), len(other)))


class Engine:
    """An engine under `misa` that routes at any length, by pool blocks of a page; records every layer's selections."""

    def __init__(self, model: str, misa: dict, **options) -> None:
        sizes = {"max_model_len": 8192, "max_num_seqs": 8, "max_num_batched_tokens": 8192, "enforce_eager": True}
        self._running = ExitStack()
        self.llm = self._running.enter_context(
            offline_engine(model, {"pool_block": 64, "min_context": 0, **misa}, **{**sizes, **ON_DEVICE, **options})
        )
        self.recorder = Recorder()

    @property
    def selected(self) -> list[dict[int, frozenset[int]]]:
        return self.recorder.selected

    @property
    def history(self) -> list[list[tuple[int, frozenset[int]]]]:
        return self.recorder.history

    @property
    def scheduler(self):
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def free_pages(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    @property
    def index_caches(self) -> list[torch.Tensor]:
        """Every indexer layer's cache, uint8 [pages, page_bytes], in the order of the model's layers."""
        layers = self.llm.llm_engine.vllm_config.compilation_config.static_forward_context
        return [layer.index_cache for name, layer in layers.items() if name.endswith("indexer.k_cache")]

    def set_chunk(self, tokens: int) -> None:
        """Schedule at most `tokens` tokens a step from now on."""
        self.scheduler.max_num_scheduled_tokens = tokens

    def forget_prefixes(self) -> None:
        assert self.llm.reset_prefix_cache()

    def generate(self, prompts: list[list[int]], tokens: int = 8) -> list[list[int]]:
        """Greedy continuations; the recorder then holds what was selected on the way."""
        self.recorder.clear()
        return greedy(self.llm, prompts, tokens)

    def close(self) -> None:
        self.recorder.close()
        del self.llm
        self._running.close()


@pytest.fixture(scope="module")
def start_engine():
    """Start engines of a module one after the other; the one before is closed."""
    running: list[Engine] = []

    def start(model: str, misa: dict | None = None, **options) -> Engine:
        while running:
            running.pop().close()
        running.append(Engine(model, misa or {}, **options))
        return running[-1]

    yield start
    while running:
        running.pop().close()


def random_prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids of an ordinary text length; special tokens are left out."""
    rng = random.Random(seed)
    return [rng.randrange(20, 500) for _ in range(length)]
