"""What the fidelity tools share: what stops one, and which machine and versions its figures belong to."""

import hashlib
import os
import platform
from datetime import datetime
from pathlib import Path

import torch

from misa_vllm import __version__
from misa_vllm.bench.report import BenchmarkError, commit, driver


class EvalError(BenchmarkError):
    """The tool cannot run; the message is one line that says what to change."""


def environment() -> dict[str, str | int | None]:
    """Names the machine and the versions that figures belong to; `hardware` is the GPU, or the CPU where none is."""
    import vllm

    on_gpu = torch.cuda.is_available()
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "hardware": torch.cuda.get_device_name() if on_gpu else f"{_cpu_name()}, {os.cpu_count()} threads",
        "gpus": torch.cuda.device_count() if on_gpu else 0,
        "driver": driver() if on_gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "misa_vllm": __version__,
        "commit": commit(),
    }


def _cpu_name() -> str:
    """The processor as the kernel names it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def require_folder(folder: Path | None) -> None:
    """Raise EvalError unless results can be written into `folder` (None: nothing is written)."""
    if folder is None:
        return
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise EvalError(f"--output {folder} cannot be written: name a folder that you may write to")


def described(file: Path) -> dict[str, str]:
    """Names a file that figures depend on, wherever it lies."""
    return {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
