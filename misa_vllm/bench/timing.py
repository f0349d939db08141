"""Time of GPU work: several calls in turn, each on inputs that are not in the L2 cache."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

EVICTING_SIZE = 2
"""Reading that many times the L2 cache leaves nothing of what was in it."""


@dataclass(frozen=True)
class Timing:
    """Time of one call, microseconds, over `runs` samples."""

    median_us: float
    p90_us: float
    runs: int

    @classmethod
    def of(cls, samples_us: Sequence[float]) -> "Timing":
        return cls(statistics.median(samples_us), percentile(samples_us, 0.9), len(samples_us))


def percentile(samples: Sequence[float], share: float) -> float:
    """The value that `share` of the samples do not exceed, between neighbours by their distance."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    low, high = math.floor(position), math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def time_in_turn(
    passes: dict[str, Callable[[], None]], calls: int, repeats: int, device: torch.device, use_graphs: bool
) -> dict[str, Timing]:
    """Name -> time of one call.

    A pass makes `calls` calls, each on inputs of its own. Each repetition times one pass of every name, in turn, so
    that clocks and temperature are the same for all; the L2 cache is emptied before each. All is queued first and
    read at the end, so the host does not hold the GPU up.

    Args:
        passes: name -> what to time; it must have run once already (compilation, workspaces).
        calls: calls per pass; a sample is a pass's time over it.
        repeats: samples of each name; one more pass before them is not counted.
        use_graphs: replay each pass as one CUDA graph, which leaves the launches' cost on the host out, instead of
            launching it anew.
    """
    filler = torch.ones(EVICTING_SIZE * l2_bytes(device) // 4, device=device)
    replays = {name: _captured(one_pass) if use_graphs else one_pass for name, one_pass in passes.items()}
    events = {name: [] for name in passes}
    for _ in range(repeats + 1):
        for name, replay in replays.items():
            filler.amax()  # reads: written lines would have to leave the cache during the timed pass
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            replay()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize(device)
    return {
        name: Timing.of([start.elapsed_time(end) * 1e3 / calls for start, end in pairs[1:]])
        for name, pairs in events.items()
    }


def _captured(one_pass: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_pass()
    return graph.replay
