"""What an engine's decode step consists of: its wall time, the GPU's work, and what the host calls to launch it."""

import statistics
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from misa_vllm.bench.timing import percentile

WARM_TOKENS = 4
"""Tokens that every request has before steps are timed: their prefills are over."""
TIMED_STEPS, PROFILED_STEPS = 64, 8
TOKENS = WARM_TOKENS + TIMED_STEPS + PROFILED_STEPS + 16
"""Tokens that requests must have room for: the scheduler runs some steps ahead."""
SHOWN_KERNELS = 20
LONGEST_NAME = 96


@dataclass(frozen=True)
class Event:
    """Something that the profiler saw; times in microseconds."""

    name: str
    start: float
    duration: float
    on_gpu: bool


def profile_decode(engine, prompts: list[dict], sampling) -> dict:
    """Decode `prompts` together, step by step.

    Args:
        engine: vLLM's `LLMEngine` whose model runs in this process.
        prompts: one request each; best in the prefix cache.
        sampling: vLLM's parameters, of TOKENS tokens for each request.

    Returns:
        "wall_ms" of TIMED_STEPS steps, and `summary` of PROFILED_STEPS more.

    Raises:
        RuntimeError: requests ended before the steps were taken.
    """
    names = [f"profiled-{number}" for number in range(len(prompts))]
    tokens = dict.fromkeys(names, 0)

    def step() -> None:
        for output in engine.step():
            tokens[output.request_id] = len(output.outputs[0].token_ids)
            if output.finished:
                raise RuntimeError(f"a request ended after {tokens[output.request_id]} tokens")

    for name, prompt in zip(names, prompts, strict=True):
        engine.add_request(name, prompt, sampling)
    while min(tokens.values()) < WARM_TOKENS:
        step()
    wall = []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        step()
        wall.append((time.perf_counter() - start) * 1e3)
    has_gpu = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if has_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            step()
        if has_gpu:
            torch.cuda.synchronize()
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    timings = {"median": statistics.median(wall), "p90": percentile(wall, 0.9), "least": min(wall), "most": max(wall)}
    return {"batch": len(prompts), "wall_ms": timings, **summary(events_of(profiler), PROFILED_STEPS)}


def events_of(profiler) -> list[Event]:
    """The GPU's work and the host's calls into CUDA, in the order in which they began."""
    cpu = torch.autograd.DeviceType.CPU
    events = []
    for one in profiler.events():
        on_gpu = one.device_type != cpu
        if getattr(one, "is_user_annotation", False) or not (on_gpu or one.name.startswith("cu")):
            continue
        events.append(Event(one.name, one.time_range.start, one.time_range.elapsed_us(), on_gpu))
    return sorted(events, key=lambda event: event.start)


def summary(events: Iterable[Event], steps: int) -> dict:
    """Figures per step: how long the GPU was busy, calls by name, and the kernels that took most."""
    gpu = [event for event in events if event.on_gpu]
    calls = [event for event in events if not event.on_gpu]
    kernels = [event for event in gpu if not event.name.startswith(("Memcpy", "Memset"))]
    busy, end = 0.0, float("-inf")
    for event in gpu:  # programmatic launches overlap the kernel before them
        busy += max(0.0, event.start + event.duration - max(event.start, end))
        end = max(end, event.start + event.duration)
    times, counts = Counter(), Counter()
    for event in gpu:
        times[event.name] += event.duration
        counts[event.name] += 1
    call_times = Counter()
    for event in calls:
        call_times[event.name] += event.duration
    call_counts = Counter(event.name for event in calls)
    return {
        "profiled_steps": steps,
        "gpu_busy_ms": busy / steps / 1e3,
        "kernels": len(kernels) / steps,
        "calls": {
            name: {"count": count / steps, "us": call_times[name] / steps} for name, count in call_counts.most_common()
        },
        "top": [
            {"name": short(name), "us": us / steps, "count": counts[name] / steps}
            for name, us in times.most_common(SHOWN_KERNELS)
        ],
    }


def short(name: str) -> str:
    """A kernel's name without its return type and arguments."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return name.partition("(")[0][:LONGEST_NAME]


def as_text(profile: dict) -> list[str]:
    """The figures as lines."""
    wall = profile["wall_ms"]
    launches = ", ".join(
        f"{name} {call['count']:.1f} ({call['us']:.0f} us)" for name, call in list(profile["calls"].items())[:10]
    )
    return [
        f"step {wall['median']:.3f} ms (p90 {wall['p90']:.3f}, least {wall['least']:.3f}, most {wall['most']:.3f}); "
        f"of a profiled step the GPU is busy {profile['gpu_busy_ms']:.3f} ms with {profile['kernels']:.1f} kernels",
        f"calls per step: {launches or 'none seen'}",
        *(f"{one['us']:9.1f} us {one['count']:6.1f}x  {one['name']}" for one in profile["top"]),
    ]
