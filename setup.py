"""Builds the optional extensions; everything else about the package is in pyproject.toml.

Two shared libraries, both against libtorch's stable ABI (one build serves torch 2.10 and later) and free of
Python's C API (one wheel serves all Python versions):

    misa_vllm/_cpu.so    csrc/cpu/*.cpp, any C++17 compiler (GCC or Clang) on Linux or macOS
    misa_vllm/_cuda.so   csrc/cuda/*.cu, CUDA 12.8 or later, for sm_90a (Hopper)

torch is found without importing it, in the environment that pip installs into, so build isolation works.

The environment variable MISA_BUILD_EXT says what to build:

    auto      (default) the CPU extension where a C++ compiler and torch's headers are found, the CUDA extension
              where a GPU and a new enough nvcc are found as well; what is left out is said in one line each
    none      nothing: pure Python
    cpu, cuda, all, or a comma-separated list
              exactly these; one that cannot be built stops the installation

CXX and NVCC name the compilers (default: c++, g++ or clang++; nvcc on PATH or in CUDA_HOME).
In place, for development: `python setup.py build_ext --inplace`.
"""

import glob
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SWITCH = "MISA_BUILD_EXT"
CHOICES = {"auto": None, "none": (), "cpu": ("cpu",), "cuda": ("cuda",), "all": ("cpu", "cuda")}
MIN_TORCH = (2, 10)
MIN_NVCC = (12, 8)
STABLE_ABI = f"-DTORCH_TARGET_VERSION=0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000"

# the inner loops are compiled once per instruction set and chosen at run time
SIMD_FLAGS = {
    "simd_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    # GCC 12 warns of uninitialized values inside its own AVX-512 header
    "simd_avx512.cpp": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-Wno-uninitialized"],
}
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-fno-strict-aliasing"]
# one contraction rule for all code that must give the same bits
SIMD_COMMON_FLAGS = ["-ffp-contract=fast", "-Wno-psabi"]
NVCC_FLAGS = [
    "-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-cudart", "static", "-lineinfo",
    "--expt-relaxed-constexpr", "-DUSE_CUDA", "-Xcompiler", "-fPIC,-fvisibility=hidden",
]  # fmt: skip


class CannotBuild(Exception):
    """Why an extension cannot be built, and what to change."""


def find_torch() -> Path:
    """The installed torch package, looked up in the target environment as well as on sys.path."""
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    for place in places:
        torch = Path(place or ".") / "torch"
        header = torch / "include/torch/headeronly/version.h"
        if not (torch / "include/torch/csrc/stable").is_dir() or not header.exists():
            continue
        text = header.read_text()
        version = tuple(
            int(re.search(rf"#define TORCH_VERSION_{part} (\d+)", text).group(1)) for part in ("MAJOR", "MINOR")
        )
        if version < MIN_TORCH:
            raise CannotBuild(f"torch {version[0]}.{version[1]} in {place} is too old, install torch >= 2.10")
        return torch
    raise CannotBuild("torch's headers were not found, install torch >= 2.10 (vllm brings it) into this environment")


def find_cxx() -> str:
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if shutil.which(name.split()[0]):
            return name
    raise CannotBuild(f"no C++ compiler was found ({wanted or 'c++, g++, clang++'}), install g++ or set CXX")


def find_nvcc() -> str:
    cuda_home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(cuda_home, "bin"))
    if nvcc is None or shutil.which(nvcc) is None:
        raise CannotBuild("nvcc was not found, install CUDA's compiler or set NVCC")
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", printed)
    version = tuple(map(int, release.groups())) if release else (0, 0)
    if version < MIN_NVCC:
        raise CannotBuild(f"{nvcc} is CUDA {version[0]}.{version[1]}, install CUDA 12.8 or later, or set NVCC")
    return nvcc


def has_gpu() -> bool:
    return bool(glob.glob("/dev/nvidia[0-9]*"))


def sources(kind: str) -> list[str]:
    return sorted(glob.glob({"cpu": "csrc/cpu/*.cpp", "cuda": "csrc/cuda/*.cu"}[kind]))


def wanted_extensions() -> tuple[list[str], bool]:
    """(names of the extensions to try, whether each must succeed)."""
    choice = os.environ.get(SWITCH, "auto").strip().lower() or "auto"
    if choice == "auto":
        names = ["cpu"]
        if sources("cuda") and has_gpu():
            names.append("cuda")
        return names, False
    names = []
    for part in choice.split(","):
        if CHOICES.get(part.strip()) is None:
            raise SystemExit(f"{SWITCH}={choice}: choose auto, none, cpu, cuda, all, or a list such as cpu,cuda")
        names += [name for name in CHOICES[part.strip()] if name not in names]
    return names, True


class BuildExtensions(build_ext):
    """Compiles each source with its own flags and links plain shared libraries."""

    def build_extensions(self):
        forced = wanted_extensions()[1]
        built = []
        for ext in self.extensions:
            kind = ext.name.rpartition("._")[2]
            try:
                self._build(ext, kind)
                built.append(ext)
            except CannotBuild as why:
                if forced:
                    raise SystemExit(f"misa_vllm: the {kind} extension cannot be built: {why}") from None
                print(f"misa_vllm: installing without the {kind} extension: {why}", file=sys.stderr)
        self.extensions = built  # wheel contents and in-place copies cover what was built

    def _build(self, ext, kind):
        if not ext.sources:
            raise CannotBuild(f"there is no source file in csrc/{kind}")
        torch = find_torch()
        compiler = [find_nvcc()] if kind == "cuda" else find_cxx().split()
        include = ["-isystem", f"{torch}/include", "-Icsrc", STABLE_ABI]
        headers = [path for pattern in ("*.h", "*.cuh") for path in glob.glob(f"csrc/**/{pattern}", recursive=True)]
        newest_header = max(map(os.path.getmtime, [*headers, __file__]))
        objects = []
        for source in ext.sources:
            target = Path(self.build_temp) / (source + ".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            objects.append(str(target))
            if target.exists() and target.stat().st_mtime > max(newest_header, os.path.getmtime(source)):
                continue
            flags = NVCC_FLAGS if kind == "cuda" else CXX_FLAGS
            name = os.path.basename(source)
            if name.startswith("simd_"):
                # an instruction set of another processor family leaves an empty file
                x86 = platform.machine().lower() in ("x86_64", "amd64")
                flags = [*flags, *SIMD_COMMON_FLAGS, *(SIMD_FLAGS.get(name, []) if x86 else [])]
            self._run([*compiler, *flags, *include, "-c", source, "-o", str(target)])
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        # libtorch is in the process already when the extension is loaded: its name suffices, no run path
        libraries = [f"-L{torch}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
        link_flags = ["-cudart", "static", "-Xlinker", "--no-as-needed"] if kind == "cuda" else []
        self._run([*compiler, "-shared", *link_flags, *objects, "-o", str(output), *libraries])

    def _run(self, command):
        print(" ".join(command), flush=True)
        finished = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        sys.stderr.write(finished.stderr)
        if finished.returncode:
            errors = [line for line in finished.stderr.splitlines() if "error" in line] or ["no message"]
            raise CannotBuild(f"{command[0]} failed: {errors[0]}")

    def get_ext_filename(self, fullname):
        return fullname.replace(".", os.sep) + ".so"


class PythonIndependentWheel(bdist_wheel):
    def get_tag(self):
        python, abi, machine = super().get_tag()
        return ("py3", "none", machine) if self.distribution.ext_modules else (python, abi, machine)


setup(
    ext_modules=[Extension(f"misa_vllm._{kind}", sources(kind)) for kind in wanted_extensions()[0]],
    cmdclass={"build_ext": BuildExtensions, "bdist_wheel": PythonIndependentWheel},
)
