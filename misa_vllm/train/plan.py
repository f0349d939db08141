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
    least: int = 0
    """Steps without which the stage is not worth its name; `--smoke` tells whether the time allows them."""
    mix: Mix = Mix()

    @property
    def sequences(self) -> int:
        """Of a step."""
        return max(1, self.tokens // self.length)


@dataclass(frozen=True)
class Plan:
    """A model's size and the stages that train it."""

    size: ModelSize
    stages: tuple[Stage, ...]
    muon_rate: float = 0.02
    adam_rate: float = 0.003
    index_rate: float = 0.5
    """Learning rates of the indexer, as a factor of the others'."""
    decay: float = 0.05
    """Weight decay of the layers' matrices, as a factor of their learning rate: what keeps the attention's logits, and
    with them bf16's rounding, from growing for as long as training lasts."""
    steady: float = 0.5
    """Share of the time before the learning rate starts to fall, linearly, to `final_rate`."""
    final_rate: float = 0.03

    def stage_at(self, progress: float) -> int:
        """Number of the stage that is on at `progress` in [0, 1)."""
        whole, passed = sum(stage.share for stage in self.stages), 0.0
        for number, stage in enumerate(self.stages):
            passed += stage.share / whole
            if progress < passed - 1e-6:
                return number
        return len(self.stages) - 1

    def progress_behind(self, name: str) -> float:
        """The progress at which the stage `name` ends.

        Raises:
            ValueError: there is no such stage; one line.
        """
        names = [stage.name for stage in self.stages]
        if name not in names:
            raise ValueError(f"the plan has no stage {name}: choose one of {', '.join(names)}")
        passed = sum(stage.share for stage in self.stages[: names.index(name) + 1])
        return min(1.0, passed / sum(stage.share for stage in self.stages))

    def rate_at(self, progress: float) -> float:
        """Factor of the learning rates."""
        if progress < self.steady:
            return 1.0
        return 1.0 - (1.0 - self.final_rate) * (progress - self.steady) / (1.0 - self.steady)


SHORT = Mix(inserted=0.75, plain=0.1)
MEDIUM = Mix(inserted=0.5, plain=0.1, most_pairs=64)
LONG = Mix(inserted=0.35, plain=0.1, most_pairs=512, answer_weight=6.0)
ENDS = replace(LONG, inserted=0.6, plain=0.05)  # of sequences that are trained behind a context only


def full_plan() -> Plan:
    """The project's model, for one H100 or H200.

    Shares are of a little over a quarter of an hour. Estimated per step, from operations and bytes: 35 ms at 256
    tokens, 45 ms at 4096, 0.11 s at 16384, 0.22 s at 32768, 0.45 s at 65536 and 1.7 s at 131072 dense (with cuDNN's
    attention two thirds of the last three); 0.1 and 0.2 s in the warm-up; 0.4 s sparse at 8192, 1.2 s at 32768, 1.8 s
    at 131072, of which the last two train the ends of their sequences only. Beyond 8192 tokens the indexer learns from
    the attention over all tokens also in the sparse stages: from the selected ones alone it could not learn of one it
    misses. `sparse-128k` has a larger factor, or the falling learning rate would leave it none to learn with.

    Nothing but the drill comes first: copying then appears within some 150 steps (measured on models of 0.7 M
    parameters), and much later with other tasks in between. Retrieval reaches about twice the length that was trained
    (measured likewise), so no stage is more than four times as long as the one before it. `dense-16k` ends at about
    half of the time: a good place to stop and resume, for the steps behind it are short enough that the optimizer's
    memory, which does not travel, is soon made up for.
    """
    longest = replace(LONG, most_pairs=1024, few=0.1)
    return Plan(
        ModelSize(),
        (
            Stage("drill-256", 0.02, 256, 65536, least=300, mix=replace(SHORT, drill=1.0)),
            Stage("dense-256", 0.06, 256, 65536, least=600, mix=replace(SHORT, drill=0.05)),
            Stage("dense-1k", 0.13, 1024, 65536, skips=0.2, least=1500, mix=MEDIUM),
            Stage("dense-4k", 0.15, 4096, 65536, skips=0.2, least=1200, mix=MEDIUM),
            Stage("dense-16k", 0.10, 16384, 65536, skips=0.2, least=350, mix=LONG),
            Stage("dense-32k", 0.07, 32768, 65536, skips=0.2, least=150, mix=LONG),
            Stage("dense-64k", 0.05, 65536, 65536, skips=0.2, least=50, mix=longest),
            Stage("dense-128k", 0.07, 131072, 131072, least=25, mix=longest),
            Stage("warmup-8k", 0.04, 8192, 65536, train_model=False, kl_rows=256, skips=0.2, least=120, mix=LONG),
            Stage("warmup-32k", 0.05, 32768, 65536, train_model=False, kl_rows=512, skips=0.2, least=120, mix=LONG),
            Stage("sparse-8k", 0.09, 8192, 65536, SPARSE, kl_rows=128, skips=0.2, rate=0.7, least=120, mix=LONG),
            Stage(
                "sparse-32k", 0.09, 32768, 131072, SPARSE, kl_rows=256, full_kl=True, context=24576, skips=0.2,
                least=40, mix=ENDS,
            ),
            Stage(
                "sparse-128k", 0.08, 131072, 131072, SPARSE, kl_rows=512, full_kl=True, context=122880, rate=1.5,
                least=25, mix=ENDS,
            ),
        ),
    )  # fmt: skip


def indexer_plan() -> Plan:
    """New indexers for a model that is trained already (`--new-indexers`): the warm-up alone, to its longest length.

    A step takes 0.2 s at 8192 tokens and 0.25 s at 32768 on an H200.
    """
    plan, longest = full_plan(), replace(LONG, most_pairs=1024, few=0.1)
    indexer = Stage("", 0.0, 0, 0, train_model=False, mix=LONG)
    return replace(
        plan,
        stages=(
            replace(indexer, name="index-8k", share=0.45, length=8192, tokens=65536, kl_rows=256, skips=0.2, least=120),
            replace(indexer, name="index-32k", share=0.4, length=32768, tokens=65536, kl_rows=512, skips=0.2, least=80),
            replace(
                indexer, name="index-128k", share=0.15, length=131072, tokens=131072, kl_rows=512, rate=2.0, least=15,
                mix=longest,
            ),
        ),
    )  # fmt: skip


def plan_32k() -> Plan:
    """The full plan without what is longer than 32768 tokens: for less time, or a GPU with less memory."""
    plan = full_plan()
    stages = [stage for stage in plan.stages if stage.length <= 32768]
    whole = sum(stage.share for stage in stages)
    return replace(plan, stages=tuple(replace(stage, share=stage.share / whole) for stage in stages))


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


PLANS = {"full": full_plan, "32k": plan_32k, "indexer": indexer_plan, "cpu": cpu_plan}


def with_vocabulary(plan: Plan, vocabulary: int) -> Plan:
    """The plan for a tokenizer of `vocabulary` tokens."""
    return replace(plan, size=replace(plan.size, vocab=vocabulary))
