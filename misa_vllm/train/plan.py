"""What is trained when: the stages of DeepSeek-V3.2's recipe, as shares of the time there is."""

from dataclasses import dataclass, replace

from misa_vllm.train.size import DENSE, SPARSE, ModelSize
from misa_vllm.train.tasks import Mix


@dataclass(frozen=True)
class Stage:
    """A part of training with one sequence length and one kind of attention."""

    name: str
    share: float
    """Of the whole training time."""
    length: int
    tokens: int
    """Per step."""
    mode: str = DENSE
    train_model: bool = True
    """False: the indexer alone learns (warm-up; report, section 2.1.1)."""
    kl_rows: int = 0
    """Queries per sequence at which the indexer learns; 0: it does not."""
    full_kl: bool = False
    context: int = 0
    """So many first tokens of a sequence are only attended to; questions come behind them."""
    skips: float = 0.0
    """Share of steps whose positions leap ahead here and there, as far as the model's last position: what stands near
    is then turned by RoPE as if it stood far away, so that long distances are known before long sequences come
    (PoSE, arXiv 2309.10400)."""
    rate: float = 1.0
    """Learning rates of this stage, as a factor."""
    mix: Mix = Mix()


@dataclass(frozen=True)
class Plan:
    """A model's size and the stages that train it."""

    size: ModelSize
    stages: tuple[Stage, ...]
    muon_rate: float = 0.02
    adam_rate: float = 0.003
    index_rate: float = 0.5
    """Learning rates of the indexer, as a factor of the others'."""
    steady: float = 0.6
    """Share of the time before the learning rate starts to fall, linearly, to `final_rate`."""
    final_rate: float = 0.03

    def stage_at(self, progress: float) -> int:
        """Number of the stage that is on at `progress` in [0, 1)."""
        whole, passed = sum(stage.share for stage in self.stages), 0.0
        for number, stage in enumerate(self.stages):
            passed += stage.share / whole
            if progress < passed - 1e-9:
                return number
        return len(self.stages) - 1

    def rate_at(self, progress: float) -> float:
        """Factor of the learning rates."""
        if progress < self.steady:
            return 1.0
        return 1.0 - (1.0 - self.final_rate) * (progress - self.steady) / (1.0 - self.steady)


SHORT = Mix(inserted=0.75, plain=0.1)
MEDIUM = Mix(inserted=0.5, plain=0.1, most_pairs=64)
LONG = Mix(inserted=0.35, plain=0.1, most_pairs=256, answer_weight=6.0)


def full_plan() -> Plan:
    """The project's model, for one H100 or H200.

    Shares are of about a quarter of an hour. Estimated per step, from operations and bytes: 25 ms at 256 tokens, 40 ms
    at 4096, 180 ms at 32768, 1.4 s at 131072 dense; 0.4 s sparse at 8192, 1 s at 32768, 1.4 s at 131072, of which the
    last two train the ends of their sequences only. Beyond 8192 tokens the indexer learns from the attention over all
    tokens also in the sparse stages: from the selected ones alone it could not learn of one it misses.
    """
    return Plan(
        ModelSize(),
        (
            Stage("drill-256", 0.02, 256, 65536, mix=replace(SHORT, drill=0.6)),
            Stage("dense-256", 0.05, 256, 65536, skips=0.2, mix=replace(SHORT, drill=0.05)),
            Stage("dense-1k", 0.12, 1024, 65536, skips=0.3, mix=MEDIUM),
            Stage("dense-4k", 0.13, 4096, 65536, skips=0.4, mix=MEDIUM),
            Stage("dense-16k", 0.08, 16384, 65536, skips=0.4, mix=LONG),
            Stage("dense-32k", 0.08, 32768, 65536, skips=0.4, mix=LONG),
            Stage("dense-128k", 0.07, 131072, 131072, mix=LONG),
            Stage("warmup-8k", 0.04, 8192, 65536, train_model=False, kl_rows=256, skips=0.4, mix=LONG),
            Stage("warmup-32k", 0.06, 32768, 65536, train_model=False, kl_rows=512, skips=0.4, mix=LONG),
            Stage("sparse-8k", 0.12, 8192, 65536, SPARSE, kl_rows=128, skips=0.4, rate=0.7, mix=LONG),
            Stage(
                "sparse-32k", 0.12, 32768, 131072, SPARSE, kl_rows=128, full_kl=True, context=24576, skips=0.4,
                rate=0.7, mix=LONG,
            ),
            Stage(
                "sparse-128k", 0.11, 131072, 131072, SPARSE, kl_rows=256, full_kl=True, context=122880, rate=0.7,
                mix=LONG,
            ),
        ),
    )  # fmt: skip


def cpu_plan() -> Plan:
    """A toy model whose stages show on one CPU core what the full one's do; for a tokenizer of about 1024 tokens."""
    size = ModelSize(
        layers=3, hidden=64, intermediate=128, heads=4, index_heads=8, index_head_dim=64, topk=48, q_lora_rank=48,
        kv_lora_rank=64, nope_head_dim=16, rope_head_dim=32, v_head_dim=16, max_position=4096, rope_theta=10000.0,
    )  # fmt: skip
    mix = Mix(inserted=0.85, plain=0.0, chat=0.0, kinds=(0.0, 0.6, 0.2, 0.0, 0.0, 0.0, 0.2))
    return Plan(
        size,
        (
            Stage("drill-64", 0.12, 64, 1024, mix=replace(mix, drill=1.0)),
            Stage("dense-128", 0.38, 128, 1024, mix=replace(mix, drill=0.1)),
            Stage("dense-256", 0.15, 256, 1024, mix=mix),
            Stage("warmup-256", 0.1, 256, 1024, train_model=False, kl_rows=64, mix=mix),
            Stage("sparse-256", 0.15, 256, 1024, SPARSE, kl_rows=64, rate=0.7, mix=mix),
            Stage("sparse-512", 0.1, 512, 1024, SPARSE, kl_rows=64, rate=0.7, mix=mix),
        ),
        steady=0.7,
    )


PLANS = {"full": full_plan, "cpu": cpu_plan}


def with_vocabulary(plan: Plan, vocabulary: int) -> Plan:
    """The plan for a tokenizer of `vocabulary` tokens."""
    return replace(plan, size=replace(plan.size, vocab=vocabulary))
