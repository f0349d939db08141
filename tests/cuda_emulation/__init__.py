"""The CUDA kernels of csrc/cuda, compiled as C++ and run on the CPU by emulator.cpp.

`build` compiles them and `Operators` stands in for `torch.ops.misa_vllm`: its operators take CPU tensors. What is
emulated, and what is not, is said in emulator.h.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = [
    "-std=c++17", "-O1", "-fPIC", "-w", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-extern-tls-init",
    "-DMISA_CUDA_EMULATION",
    f"-I{HERE / 'include'}", f"-I{HERE}", f"-I{CSRC}",
]  # fmt: skip
KERNELS = ("decode_select", "page_means", "route_heads", "rerank", "prefill_select")
SHARED_BYTES = 227 * 1024
SCALAR_TYPES = {
    torch.uint8: 0,
    torch.int32: 3,
    torch.int64: 4,
    torch.float32: 6,
    torch.float8_e4m3fn: 24,
}


class EmulationError(RuntimeError):
    """A kernel went wrong: what was found, and in which CTA."""


def find_compiler() -> str | None:
    """A C++ compiler that can build the emulator here, or None."""
    if not sys.platform.startswith("linux"):
        return None
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def _translation_unit(source: Path) -> str:
    """A kernel file, and the dynamic shared memory that its kernels declare as an array of unknown size."""
    definitions = ""
    for path in (source, source.with_suffix(".cuh")):
        text = path.read_text() if path.exists() else ""
        declared = set(re.findall(r"extern __shared__ (?:__align__\((\d+)\) )?(\w+) (\w+)\[\]", text))
        if not declared:
            continue
        opened = "".join(re.search(r"^(namespace [\w:]+ \{\n)(namespace \{\n)?", text, re.MULTILINE).groups(default=""))
        variables = "".join(
            f"alignas({alignment or 16}) thread_local {kind} {name}[{SHARED_BYTES}];\n"
            for alignment, kind, name in declared
        )
        definitions += f"{opened}{variables}{'}' * opened.count('{')}\n"
    return f'#include "cuda/{source.name}"\n{definitions}'


def build(folder: Path, names: Sequence[str] = KERNELS, edit: Callable[[str], str] | None = None) -> "Operators":
    """Compile csrc/cuda/<name>.cu of the given names and the emulator into a library in `folder`.

    `edit` changes the text of every source first, for tests that break a kernel on purpose.
    """
    compiler = find_compiler()
    csrc = CSRC
    if edit is not None:
        csrc = folder / "csrc"
        shutil.copytree(CSRC / "cuda", csrc / "cuda")
        for path in csrc.rglob("*.cu*"):
            path.write_text(edit(path.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    commands = [(HERE / "emulator.cpp", "emulator")]
    for name in names:
        unit = folder / f"{name}.cpp"
        unit.write_text(_translation_unit(csrc / "cuda" / f"{name}.cu"))
        commands.append((unit, name))
    flags = [flag.replace(str(CSRC), str(csrc)) for flag in FLAGS]
    objects = [str(folder / f"{name}.o") for _, name in commands]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(
            lambda unit: _run([compiler, *flags, "-c", str(unit[0][0]), "-o", unit[1]]), zip(commands, objects)
        ))  # fmt: skip
    library = folder / f"emulated_{hashlib.sha1(str(folder).encode()).hexdigest()[:8]}.so"
    _run([compiler, "-shared", "-pthread", *objects, "-o", str(library)])
    return Operators(library)


def _run(command: list[str]) -> None:
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{finished.stderr[-4000:]}")


class _TensorData(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("dim", ctypes.c_int64), ("sizes", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 4), ("type", ctypes.c_int32), ("item_bytes", ctypes.c_int32),
    ]  # fmt: skip


class _Value(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("integer", ctypes.c_int64), ("tensor", _TensorData)]


def _value_of(argument: torch.Tensor | int | None) -> _Value:
    if argument is None:
        return _Value(kind=0)
    if not isinstance(argument, torch.Tensor):
        return _Value(kind=1, integer=int(argument))
    padding = [0] * (4 - argument.dim())
    return _Value(
        kind=2,
        tensor=_TensorData(
            data=argument.data_ptr(),
            dim=argument.dim(),
            sizes=(ctypes.c_int64 * 4)(*argument.shape, *padding),
            strides=(ctypes.c_int64 * 4)(*argument.stride(), *padding),
            type=SCALAR_TYPES[argument.dtype],
            item_bytes=argument.element_size(),
        ),
    )


class Operators:
    """The operators of a compiled library: attributes under the names that they have in torch.ops.misa_vllm."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library), mode=os.RTLD_LOCAL)
        self._library.misa_emulation_launch_count.restype = ctypes.c_int64
        self._in_stream = False
        self._held: list[tuple] = []  # arguments of calls that have not run: a caller may have dropped them
        self.configure()

    def configure(self, multiprocessors: int = 4, seed: int = 0) -> None:
        """How many multiprocessors the device has, and the order in which things happen."""
        self._library.misa_emulation_configure(ctypes.c_int(multiprocessors), ctypes.c_uint64(seed))

    @contextlib.contextmanager
    def stream(self):
        """What is launched inside runs at the end, a kernel over the one before where it may; no result before."""
        self._in_stream = True
        try:
            yield
        finally:
            self._in_stream = False
        self._finish()

    @property
    def launches(self) -> int:
        """Kernels and memsets launched so far."""
        return self._library.misa_emulation_launch_count()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return functools.partial(self._call, name)

    def _call(self, name: str, *arguments: torch.Tensor | int | None) -> int:
        self._held.append(arguments)
        values = (_Value * len(arguments))(*map(_value_of, arguments))
        result, message = ctypes.c_int64(), ctypes.create_string_buffer(4000)
        failed = self._library.misa_emulation_call(
            name.encode(), values, len(arguments), ctypes.byref(result), message, len(message)
        )
        if failed:
            self._held = []
            raise EmulationError(message.value.decode(errors="replace"))
        if not self._in_stream:
            self._finish()
        return result.value

    def _finish(self) -> None:
        message = ctypes.create_string_buffer(4000)
        failed = self._library.misa_emulation_finish(message, len(message))
        self._held = []
        if failed:
            raise EmulationError(message.value.decode(errors="replace"))


def launchers(operators: Operators) -> ModuleType:
    """A copy of `misa_vllm.kernels.cuda` that calls these operators, with tensors on the CPU."""
    spec = importlib.util.find_spec("misa_vllm.kernels.cuda")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._EXTENSION = SimpleNamespace(operators=operators)
    module._DEMANDS = replace(module._DEMANDS, device_type="cpu")
    return module
