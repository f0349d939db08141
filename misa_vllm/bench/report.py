"""What benchmarks and fidelity tools share: what stops one, which machine it ran on, how its figures are written."""

import contextlib
import importlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import torch

from misa_vllm import __version__


class BenchmarkError(Exception):
    """The benchmark cannot run; the message is one line that says what to change."""


def require_gpu() -> None:
    """Raise BenchmarkError unless a CUDA GPU and the supported vLLM are here."""
    if not torch.cuda.is_available():
        raise BenchmarkError("torch sees no CUDA GPU: run this with an NVIDIA GPU and a CUDA build of torch")
    try:
        from misa_vllm.seam import version_problem

        problem = version_problem()
    except ImportError as error:
        raise BenchmarkError(f"vLLM does not import ({error}): pip install vllm==0.32.0") from None
    if problem is not None:
        raise BenchmarkError(problem)


def require_plots(file: Path) -> None:
    """Raise BenchmarkError unless matplotlib is here and draws files of this suffix."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise BenchmarkError('--plot needs matplotlib: pip install "misa_vllm[bench]"') from None
    if file.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise BenchmarkError(f"--plot {file}: end the name in .png, .svg or .pdf")


def require_writable(*files: Path | None) -> None:
    """Raise BenchmarkError unless each file that is given can be written: asked before anything is measured."""
    for file in files:
        if file is None:
            continue
        folder = file.resolve().parent
        while not folder.exists():
            folder = folder.parent
        if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise BenchmarkError(f"{file} cannot be written: name a file in a folder that you may write to")


def require_folder(folder: Path | None) -> None:
    """Raise BenchmarkError unless results can be written into `folder` (None: nothing is written)."""
    if folder is None:
        return
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise BenchmarkError(f"--output {folder} cannot be written: name a folder that you may write to")


def commit() -> str | None:
    """The checkout's commit, with "-dirty" if files differ from it, or None outside of one."""
    folder = Path(__file__).resolve().parent
    describe = ["git", "-C", folder, "describe", "--always", "--dirty", "--exclude", "*"]
    with contextlib.suppress(OSError):
        return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
    return None


def driver() -> str | None:
    """The NVIDIA driver's version, or None where nvidia-smi is missing."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        return subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0].strip() or None
    return None


def cpu_name() -> str:
    """The processor as the kernel names it, or its architecture."""
    lines = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def environment() -> dict[str, str | int | None]:
    """Names the machine and the versions that figures belong to; `hardware` is the GPU, or the CPU where none is."""
    import vllm

    on_gpu = torch.cuda.is_available()
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "hardware": torch.cuda.get_device_name() if on_gpu else f"{cpu_name()}, {os.cpu_count()} threads",
        "gpus": torch.cuda.device_count() if on_gpu else 0,
        "driver": driver() if on_gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if on_gpu else None,  # CPU builds have none
        "vllm": vllm.__version__,
        "misa_vllm": __version__,
        "commit": commit(),
    }


def plain(arguments: dict) -> dict:
    """The command line's arguments that are figures, words, or lists of them."""
    kinds = (bool, int, float, str, list, dict, type(None))
    return {name: value for name, value in arguments.items() if isinstance(value, kinds)}


def headline(environment: dict[str, str | int | None]) -> str:
    """`environment` in one line."""
    versions = (f"{name} {value}" for name, value in environment.items() if value and name not in ("date", "hardware"))
    return ", ".join([environment["hardware"], *versions, environment["date"]])


def aligned_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """Columns under a header; the first `left` of them flush left, the others flush right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary path of the same suffix; it becomes `file` if the block ends well and is removed otherwise."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}-", suffix=file.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp's file is private, the result need not be
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a whole file or none."""
    with replacing(file) as temporary:
        temporary.write_text(text)


def one_line(error: BaseException) -> str:
    """An exception's type and first line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least `least`."""

    def whole_number(text: str) -> int:
        value = int(text)
        if value < least:
            raise ValueError
        return value

    whole_number.__name__ = f"number of at least {least}"
    return whole_number
