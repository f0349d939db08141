"""Child processes that end with this one, whatever ends it: servers, and engines that benchmarks start."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

START_TIMEOUT_S = 1800.0  # a large checkpoint takes minutes to load
STOP_TIMEOUT_S = 20.0
TAIL_LINES = 20
PYTHON = sys.executable


class ServerError(Exception):
    """A server did not start; the message says why, under the last lines of its log."""


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def tail(log: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a file that are not blank."""
    return [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()][-lines:]


@contextmanager
def started(command: Sequence[str], **options) -> Iterator[subprocess.Popen]:
    """A process in a session of its own: its workers can be ended with it, and Ctrl-C reaches this process alone.

    All of them are killed when the block ends, or with this process, even if that is killed itself. `options` are
    `Popen`'s.
    """
    process = subprocess.Popen(command, start_new_session=True, **options)
    # sees its standard input close when this process dies
    code = f"import os, sys; sys.stdin.read(); os.killpg({process.pid}, {signal.SIGKILL:d})"
    guard = subprocess.Popen([PYTHON, "-c", code], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield process
    finally:
        guard.kill()
        guard.wait()
        guard.stdin.close()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(
    command: Sequence[str], timeout: float, stdout: IO, stderr: IO | int = subprocess.STDOUT, env: Mapping | None = None
) -> str | None:
    """Run `command` to its end; what went wrong, or None. `timeout` in seconds."""
    with started(command, stdout=stdout, stderr=stderr, env=env) as process:
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"it took more than {timeout:g} s: raise --timeout or measure less"
    return None if code == 0 else f"its process ended with code {code}"


@contextmanager
def running_server(command: Sequence[str], port: int, log: Path, timeout: float = START_TIMEOUT_S) -> Iterator[str]:
    """Run `command` until the block ends, however it ends; yields the base URL once the server answers.

    Raises:
        ServerError: the server stopped, or did not answer within `timeout` seconds.
    """
    with open(log, "wb") as output, started(command, stdout=output, stderr=subprocess.STDOUT) as server:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(server, url, log, timeout)
        try:
            yield url
        finally:
            with suppress(subprocess.TimeoutExpired):
                server.terminate()
                server.wait(timeout=STOP_TIMEOUT_S)


def _wait_until_healthy(server: subprocess.Popen, url: str, log: Path, timeout: float) -> None:
    live, start = sys.stdout.isatty(), time.monotonic()
    shown = start
    while True:
        if server.poll() is not None:
            lines = "\n".join(f"    | {line}" for line in tail(log))
            raise ServerError(f"{lines}\nthe server stopped with status {server.returncode}")
        elapsed = time.monotonic() - start
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                print(("\r\033[K" if live else "") + f"Server up after {elapsed:.0f} s", flush=True)
                return
        except (urllib.error.URLError, OSError):
            pass
        if elapsed > timeout:
            raise ServerError(f"the server did not answer within {timeout:.0f} s")
        if live:
            last = (tail(log, 1) or [""])[0]
            line = f"Starting the server  {elapsed:.0f} s  {last}"
            print("\r\033[K" + line[: shutil.get_terminal_size().columns - 1], end="", flush=True)
        elif time.monotonic() - shown >= 10:
            shown = time.monotonic()
            print(f"Starting the server  {elapsed:.0f} s", flush=True)
        time.sleep(0.5)
