"""The training loop: stages by the clock, batches made by other processes, curves, checkpoints.

Time is the budget. `progress` runs from 0 to 1 over the whole training; a run takes it from where its checkpoint
stands to `--until` in the minutes it has, whatever the machine's speed, so stages keep their shares and the learning
rate has fallen when training ends.
"""

import json
import math
import multiprocessing
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from misa_vllm.models import trained
from misa_vllm.train import batches, checkpoint, kernels
from misa_vllm.train.batches import Batch
from misa_vllm.train.bpe import Encoder
from misa_vllm.train.evaluate import DEPTHS, autocast, kept_by_misa, needle_accuracy, perplexity
from misa_vllm.train.model import DENSE, SPARSE, DsaModel
from misa_vllm.train.optim import Optimizer
from misa_vllm.train.plan import Plan, Stage
from misa_vllm.train.tasks import NOT_SCORED, TASKS, WEIGHT_UNIT, Corpus

WARM_STEPS = 100  # of a fresh run: the learning rate rises from zero
REWARM_STEPS = 40  # of a resumed run, and of every stage that starts to train other parameters
SAVE_SECONDS = 120  # between checkpoints, so that a run that breaks off loses little
LONG_PROMPT = 40_000  # tokens from which an evaluation takes three depths, one needle each
START_SECONDS = 20  # of a run before its first step: imports, processes, the choice of kernels
CURVES = "curves.jsonl"
PREFLIGHT = "preflight.json"


@dataclass(frozen=True)
class Options:
    """What one run may do."""

    data: Path
    out: Path
    minutes: float = 10.0
    until: float = 1.0
    """Progress at which the run ends."""
    steps: int = 0
    """Instead of by the clock: this many steps from progress 0 to 1 (for tests); the run does its part of them."""
    resume: Path | None = None
    new_indexers: bool = False
    """Resume with indexers that have learnt nothing, and at the beginning of the plan."""
    concentrate: float = 0.0
    """Weight in the indexer's loss of the logarithm of how many heads count for a query."""
    workers: int = 0
    device: str = "cpu"
    seed: str = "misa"
    compile: bool = False
    smoke: int = 0
    """Steps per stage of a smoke run, which measures every stage at its full length instead of training."""
    log_seconds: float = 3.0
    eval_needles: int = 2
    """Needles per depth and length of the evaluation after a stage; the last one takes four times as many."""
    eval_lengths: tuple[int, ...] = ()
    finish_seconds: float = 25.0
    """Kept for the last evaluation and the checkpoint."""


# ---------------------------------------------------------------- one step


class Trainer:
    """A model with its optimizer, and what the curves need of every step."""

    def __init__(self, plan: Plan, model: DsaModel, device: torch.device) -> None:
        self.plan, self.model, self.device = plan, model, device
        self.optimizer: Optimizer | None = None
        self.index_optimizer: Optimizer | None = None
        self.sums = torch.zeros(3, len(TASKS), dtype=torch.float64, device=device)
        self.index_sums = torch.zeros(4, device=device)  # of the indexers' figures, and of steps
        self.norm = torch.zeros((), device=device)

    def prepare(self, stage: Stage) -> None:
        """Choose what learns in `stage`; an optimizer that is in use already keeps its state."""
        plan = self.plan
        if not stage.train_model:
            self.optimizer = None
        elif self.optimizer is None:
            main = _Part(self.model, indexer=False)
            self.optimizer = Optimizer(main, plan.muon_rate, plan.adam_rate, plan.decay)
        if stage.kl_rows and self.index_optimizer is None:
            part = _Part(self.model, indexer=True)
            self.index_optimizer = Optimizer(part, plan.index_rate * plan.muon_rate, plan.index_rate * plan.adam_rate)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(bool(stage.kl_rows) if ".indexer." in name else stage.train_model)

    def step(self, stage: Stage, batch: Batch, scale: float) -> None:
        """One update; sums for the curves stay on the device, so that nothing waits for it."""
        sample, context = batch.sample, stage.context
        tokens = _to(sample.tokens.astype(np.int32), self.device).long()
        weights = _to(sample.weights[:, 1 + context :], self.device).flatten().float() / WEIGHT_UNIT
        tasks = _to(sample.tasks[:, 1 + context :], self.device).flatten().long()
        positions = _to(batch.positions, self.device)
        kl_rows = None if batch.rows is None else _to(batch.rows, self.device)
        with autocast(self.device):
            hidden, kl = self.model(tokens[:, :-1], stage.mode, kl_rows, stage.full_kl, context, positions)
            with torch.set_grad_enabled(stage.train_model):
                losses, right = self.model.token_losses(hidden, tokens[:, 1 + context :])
        loss = (losses * weights).sum() / weights.sum()
        total = loss * stage.train_model + (kl if kl_rows is not None else 0.0)
        total.backward()
        figures = torch.zeros(3, device=self.device)
        if kl_rows is not None:
            figures = torch.stack([layer.self_attn.indexer.figures for layer in self.model.model["layers"]]).mean(0)
        with torch.no_grad():
            scored = tasks != NOT_SCORED
            slots = tasks.where(scored, 0)
            for row, values in enumerate((losses, right, torch.ones_like(losses))):
                self.sums[row].index_add_(0, slots, values.double() * scored)
            self.index_sums += torch.cat([figures, figures.new_ones(1)])
        if self.optimizer:
            self.norm = self.optimizer.step(scale)
        if self.index_optimizer and stage.kl_rows:
            self.index_optimizer.step(scale)

    def take_figures(self) -> dict:
        """Means since the last call: loss and share of right tokens per task, the indexer's loss and heads."""
        loss, right, count = self.sums.cpu().tolist()
        kl, heads, against, steps = self.index_sums.tolist()
        self.sums.zero_()
        self.index_sums.zero_()
        figures = {"kl": kl / max(1, steps), "norm": float(self.norm)}
        if heads:
            figures |= {"heads": round(heads / steps, 2), "against": round(against / steps, 4)}
        for number, task in enumerate(TASKS):
            if count[number]:
                figures[task] = round(loss[number] / count[number], 4)
                figures[f"{task}_right"] = round(right[number] / count[number], 4)
        return figures


def _asked(length: int, seeds: int) -> tuple[int, tuple[float, ...]]:
    """How many needles at which depths an evaluation asks for."""
    return (1, DEPTHS[::5]) if length > LONG_PROMPT else (seeds, DEPTHS)


class _Part(torch.nn.Module):
    """The indexers' parameters of a model, or all others, for an optimizer of their own."""

    def __init__(self, model: DsaModel, *, indexer: bool) -> None:
        super().__init__()
        self._names = {name: p for name, p in model.named_parameters() if (".indexer." in name) == indexer}
        for parameter in self._names.values():
            parameter.requires_grad_(True)

    def named_parameters(self, *arguments, **options):
        return iter(self._names.items())


def _to(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


# ---------------------------------------------------------------- the loop


def train(plan: Plan, options: Options, log=print) -> dict:
    """Train until the time is up; returns the last page of the checkpoint.

    Raises:
        ValueError: data or checkpoint cannot be used; one line.
        RuntimeError: the device computes nothing right.
    """
    started = time.monotonic()
    if options.new_indexers and not options.resume:
        raise ValueError("--new-indexers are for a model that is trained already: name its checkpoint with --resume")
    device = torch.device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    pool = None
    held_out = Corpus.read(options.data, "heldout")
    Corpus.read(options.data)  # what is wrong with it is said here: a pool would start failing processes for ever
    if options.workers:
        # before CUDA starts in this process; each worker reads the corpus once
        context = multiprocessing.get_context("spawn")
        pool = context.Pool(options.workers, batches.start_worker, (options.data,))
    if pool is None:
        batches.start_worker(options.data)
    if options.resume:
        model, page = checkpoint.load(options.resume, device)
        if model.size != plan.size:
            raise ValueError(f"{options.resume} holds a model of another size: resume it with the plan that made it")
        if options.new_indexers:
            torch.manual_seed(batches.number_of(options.seed) % 2**31)
            model.start_indexers()
            page["progress"] = 0.0
        _check_tokenizer(options.resume / trained.TOKENIZER, options.data / trained.TOKENIZER)
    else:
        torch.manual_seed(batches.number_of(options.seed) % 2**31)
        model, page = DsaModel(plan.size).to(device), {"progress": 0.0, "stage_steps": {}, "steps": 0, "tokens": 0}
    if options.compile:
        for layer in model.model["layers"]:
            layer.mlp.compile()
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    size = plan.size
    for line in kernels.choose(
        device, size.heads, size.index_heads, size.head_dim, size.index_head_dim, size.topk
    ):
        log(line)
    for layer in model.model["layers"]:
        layer.self_attn.indexer.concentrate = options.concentrate
    if options.concentrate:
        page["concentrate"] = options.concentrate
    trainer = Trainer(plan, model, device)
    parameters = sum(p.numel() for p in model.parameters())
    log(f"{parameters / 1e6:.2f} M parameters on {device}, progress {page['progress']:.3f} to {options.until}")
    curves = open(options.out / CURVES, "a", encoding="utf-8")  # noqa: SIM115
    try:
        loop = _Loop(plan, options, trainer, page, held_out, curves, log, started)
        if options.smoke:
            loop.smoke(pool)
        else:
            loop.run(pool)
        return loop.page
    finally:
        curves.close()
        if pool:
            pool.terminate()


def _check_tokenizer(of_model: Path, of_data: Path) -> None:
    """Raise ValueError where a packed model, which has a tokenizer beside it, and the data have different ones."""
    if of_model.is_file() and Encoder(of_model).ids != Encoder(of_data).ids:
        raise ValueError(
            f"{of_data} is not the tokenizer of {of_model.parent}: make the data with "
            f"misa_vllm.train.corpus --tokenizer {of_model}"
        )


class _Loop:
    def __init__(self, plan, options, trainer, page, held_out, curves, log, started) -> None:
        self.plan, self.options, self.trainer = plan, options, trainer
        self.page, self.held_out, self.curves, self.log = page, held_out, curves, log
        self.started = started
        self.deadline = started + 60 * options.minutes - options.finish_seconds
        self.stages = {stage.name: stage for stage in plan.stages}
        self.saved = started
        self.good = None  # weights of the last log line whose figures were finite

    def run(self, pool) -> None:
        page, options, plan = self.page, self.options, self.plan
        current, source, since = None, None, 0
        logged, steps_logged, tokens_logged = time.monotonic(), 0, 0
        while page["progress"] < options.until - 1e-9:
            began = time.monotonic()
            if not options.steps and began >= self.deadline:
                break
            stage = self.stages[plan.stages[plan.stage_at(page["progress"])].name]
            if current is None or stage.name != current.name:
                if current is not None:
                    self.save()
                    self.evaluate(current)
                self.trainer.prepare(stage)
                source = batches.stream(
                    options.seed, stage, page["stage_steps"].get(stage.name, 0), plan.size.max_position - 1, pool
                )
                warm = REWARM_STEPS if page["steps"] or options.resume else WARM_STEPS
                changed = current is None or current.train_model != stage.train_model or bool(
                    current.kl_rows
                ) != bool(stage.kl_rows)
                since = 0 if changed else warm
                current = stage
                began = time.monotonic()
                logged, steps_logged, tokens_logged = began, 0, 0
            batch = next(source)
            scale = plan.rate_at(page["progress"]) * stage.rate * min(1.0, (since + 1) / warm)
            if not self._careful_step(stage, batch, scale):
                current = None
                continue
            since += 1
            page["stage_steps"][stage.name] = page["stage_steps"].get(stage.name, 0) + 1
            page["steps"] += 1
            page["tokens"] += batch.sample.tokens.shape[0] * stage.length
            steps_logged += 1
            tokens_logged += batch.sample.tokens.shape[0] * stage.length
            now = time.monotonic()
            if now - logged >= options.log_seconds:
                figures = self.trainer.take_figures()  # waits for the device, so the rate below is a true one
                now = time.monotonic()
                self._report(stage, scale, figures, tokens_logged / (now - logged), steps_logged / (now - logged))
                logged, steps_logged, tokens_logged = now, 0, 0
            if options.steps:
                page["progress"] += 1 / options.steps
            else:
                left = max(1e-3, self.deadline - began)
                page["progress"] += (options.until - page["progress"]) * min(1.0, (now - began) / left)
                if self.deadline - now < 1e-3:
                    page["progress"] = options.until
        self.save()
        if current is not None:
            self.evaluate(current, last=True)
        self.save()

    def smoke(self, pool) -> None:
        """A few steps of every stage at its full length: what can fail, fails here, and the time of the plan is told.

        `page["fits"]` says whether every stage would get the steps it needs between the run's progress and `until`.
        """
        plan, options, log = self.plan, self.options, self.log
        span = max(1e-9, options.until - self.page["progress"])
        whole, passed, found = sum(stage.share for stage in plan.stages), 0.0, []
        if pool:  # its processes take seconds to start
            ready = batches.stream("start", plan.stages[0], 0, plan.size.max_position - 1, pool)
            for _ in range(batches.PREFETCH):
                next(ready)
        for stage in plan.stages:
            begins, passed = passed, passed + stage.share / whole
            part = max(0.0, min(passed, options.until) - max(begins, self.page["progress"])) / span
            try:
                found.append({"stage": stage.name, "part": part, "least": stage.least, **self._measure(stage, pool)})
            except (torch.OutOfMemoryError, RuntimeError) as error:
                torch.cuda.empty_cache()
                said = (str(error).splitlines() or [""])[0]
                found.append({"stage": stage.name, "part": part, "failed": f"{type(error).__name__}: {said}"})
                log(f"{stage.name:12} FAILED {found[-1]['failed']}")
        began = time.monotonic()
        self.save()
        saved = time.monotonic() - began

        evaluations = sum(figures.get("evaluation_s", 0.0) + saved for figures in found if figures["part"])
        seconds = 60 * options.minutes - options.finish_seconds - START_SECONDS - evaluations
        needed, fits = 0.0, seconds > 0
        log(f"{options.minutes:g} minutes: {seconds:.0f} s of training from {self.page['progress']:.2f} to "
            f"{options.until:.2f}, {evaluations:.0f} s of evaluations and checkpoints")  # fmt: skip
        for figures in found:
            if "failed" in figures:
                fits = False
                continue
            step = max(figures["step_s"], figures["batch_s"])
            steps = int(figures["part"] * seconds / step)
            enough = not figures["part"] or steps >= figures["least"]
            figures |= {"seconds": round(figures["part"] * seconds, 1), "steps": steps, "enough": enough}
            needed += figures["least"] * step if figures["part"] else 0.0
            fits = fits and enough
            log(f"{figures['stage']:12} {figures['seconds']:6.0f} s {steps:6} steps, needs {figures['least']:5} "
                f"{'' if enough else 'TOO FEW'}")  # fmt: skip
        self.page["fits"] = fits
        verdict = "fits" if fits else "DOES NOT FIT"
        log(f"the plan {verdict}: its least number of steps takes {needed:.0f} of {seconds:.0f} s")
        record = {"fits": fits, "seconds": seconds, "needed_s": needed, "save_s": saved, "stages": found}
        (options.out / PREFLIGHT).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def _measure(self, stage: Stage, pool) -> dict:
        """Time of a step, of making its batch and of evaluating the stage; memory at most in use."""
        trainer, on_gpu = self.trainer, self.trainer.device.type == "cuda"
        trainer.prepare(stage)
        source = batches.stream(self.options.seed, stage, 0, self.plan.size.max_position - 1, pool)
        began, many = time.monotonic(), batches.PREFETCH // 2 if pool else 1
        made = [next(source) for _ in range(many)]
        batch_s = (time.monotonic() - began) / many
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.monotonic()
        trainer.step(stage, made[0], 0.1)
        trainer.take_figures()  # waits for the device
        first_s, began = time.monotonic() - began, time.monotonic()
        for number in range(self.options.smoke):
            trainer.step(stage, made[(number + 1) % many], 0.1)
        figures = trainer.take_figures()
        step_s = (time.monotonic() - began) / self.options.smoke
        memory = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
        if not all(math.isfinite(value) for value in figures.values()):
            raise RuntimeError("the loss is not finite")
        evaluation_s = 0.0
        for mode in self._modes():
            needle_accuracy(trainer.model, self.held_out, stage.length, mode, 1, (0.5,))  # warms up
            began = time.monotonic()
            needle_accuracy(trainer.model, self.held_out, stage.length, mode, 1, (0.5,))
            prompts = _asked(stage.length, self.options.eval_needles)
            evaluation_s += (time.monotonic() - began) * len(prompts[1]) * prompts[0]
        tokens_per_s = stage.sequences * stage.length / step_s
        self.log(
            f"{stage.name:12} {step_s * 1e3:8.1f} ms a step (first {first_s:.1f} s), {tokens_per_s / 1e3:7.1f}k/s, "
            f"batch {batch_s * 1e3:6.1f} ms, {memory:6.1f} GB, evaluation {evaluation_s:5.1f} s, "
            f"loss {figures.get('text', 0):.2f} kl {figures['kl']:.2f}"
        )
        return {
            "step_s": step_s, "first_s": first_s, "batch_s": batch_s, "tokens_per_s": round(tokens_per_s),
            "memory_gb": round(memory, 2), "evaluation_s": evaluation_s,
        }  # fmt: skip

    def _careful_step(self, stage: Stage, batch: Batch, scale: float) -> bool:
        """A step; where memory runs out, the stage goes on with half of what takes it. False: the stage changed."""
        try:
            self.trainer.step(stage, batch, scale)
            return True
        except torch.OutOfMemoryError:
            for parameter in self.trainer.model.parameters():
                parameter.grad = None
        torch.cuda.empty_cache()
        if stage.tokens > stage.length:
            smaller = replace(stage, tokens=max(stage.length, stage.tokens // 2))
        elif stage.length > 2048:
            smaller = replace(stage, length=stage.length // 2, tokens=stage.tokens // 2, context=stage.context // 2)
        else:
            raise ValueError(f"stage {stage.name} does not fit into this device's memory: choose fewer tokens per step")
        self.stages[stage.name] = smaller
        self.log(f"OUT OF MEMORY in {stage.name}: now {smaller.tokens} tokens a step, {smaller.length} a sequence")
        return False

    def _report(self, stage: Stage, scale: float, figures: dict, tokens_per_s: float, steps_per_s: float) -> None:
        page = self.page
        memory = torch.cuda.max_memory_allocated() / 1e9 if self.trainer.device.type == "cuda" else 0.0
        record = {
            "seconds": round(time.monotonic() - self.started, 1), "progress": round(page["progress"], 4),
            "stage": stage.name, "steps": page["steps"], "tokens": page["tokens"], "scale": round(scale, 4),
            "tokens_per_s": round(tokens_per_s), "steps_per_s": round(steps_per_s, 2), "memory_gb": round(memory, 1),
            **figures,
        }  # fmt: skip
        self._write(record)
        shown = " ".join(f"{t} {figures[t]:.2f}/{figures[f'{t}_right']:.2f}" for t in TASKS if t in figures)
        self.log(
            f"{record['seconds']:6.0f}s p{record['progress']:.3f} {stage.name:12} {page['tokens'] / 1e6:8.2f}M "
            f"{tokens_per_s / 1e3:6.0f}k/s {memory:4.0f}G kl {figures['kl']:.3f} heads {figures.get('heads', 0):.1f} "
            f"|g| {figures['norm']:.2f} {shown}"
        )
        finite = all(math.isfinite(value) for value in figures.values())
        if finite and time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()
        if finite:
            self.good = [p.detach().clone() for p in self.trainer.model.parameters()]
        elif self.good is not None:
            self.log("NOT FINITE: back to the weights of the last good line, with fresh optimizers")
            with torch.no_grad():
                for parameter, good in zip(self.trainer.model.parameters(), self.good, strict=True):
                    parameter.copy_(good)
            self.trainer.optimizer = self.trainer.index_optimizer = None
            self.trainer.prepare(stage)
        else:
            raise ValueError("the loss is not finite from the start: lower the learning rates of the plan")

    def evaluate(self, stage: Stage, last: bool = False) -> None:
        """Needles by length and held-out perplexity; what goes wrong in it ends no training."""
        try:
            self._evaluate(stage, last)
        except RuntimeError as error:  # its prompts have lengths that no step has had
            said = (str(error).splitlines() or [""])[0]
            self.log(f"EVALUATION FAILED, {type(error).__name__}: {said}")

    def _evaluate(self, stage: Stage, last: bool) -> None:
        """With dense attention and, once it is trained, with the indexer's selection."""
        options, model = self.options, self.trainer.model
        began = time.monotonic()
        lengths = options.eval_lengths or (stage.length,)
        seeds = options.eval_needles * (4 if last else 1)
        record: dict = {"evaluation": stage.name, "progress": round(self.page["progress"], 4)}
        for mode in self._modes():
            for length in lengths:
                if length > 4 * stage.length or length < 128:
                    continue
                depths = needle_accuracy(model, self.held_out, length, mode, *_asked(length, seeds))
                record[f"needle/{mode}/{length}"] = {str(depth): share for depth, share in depths.items()}
                mean = sum(depths.values()) / len(depths)
                shown = " ".join(f"{share:.2f}" for share in depths.values())
                self.log(f"   needles {mode:6} {length:6}: {mean:.3f}  {shown}")
            length = min(stage.length, 4096)
            record[f"perplexity/{mode}/{length}"] = value = perplexity(
                model, self.held_out.tokens, length, max(4, 65536 // length), mode
            )
            self.log(f"   held-out perplexity {mode:6} at {length}: {value:.3f}")
        record["seconds"] = round(time.monotonic() - began, 1)
        self._write(record)
        if last and self.trainer.index_optimizer:
            kept = kept_by_misa(model, self.held_out.tokens, log=self.log)
            if kept:
                self._write({name: record[name] for name in ("evaluation", "progress")} | kept)

    def _modes(self) -> list[str]:
        return [DENSE, SPARSE] if self.trainer.index_optimizer else [DENSE]

    def save(self) -> None:
        """Write the checkpoint."""
        self.saved = time.monotonic()
        checkpoint.save(self.options.out, self.trainer.model, {**self.page, "seed": self.options.seed})

    def _write(self, record: dict) -> None:
        self.curves.write(json.dumps(record) + "\n")
        self.curves.flush()
