"""Servers and other child processes end with whoever started them."""

import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from misa_vllm import processes
from misa_vllm.processes import ServerError

# answers /health after a moment, and has a child as vLLM has workers; both ignore SIGTERM
SERVER = """
import http.server, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[2], "w").write(str(child.pid))
time.sleep(0.5)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid, within=20.0):
    end = time.monotonic() + within
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.1)
    return not alive(pid)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "STOP_TIMEOUT_S", 0.5)
    port = processes.free_port()
    return [sys.executable, "-c", SERVER, str(port), str(tmp_path / "pid")], port, tmp_path / "log"


@pytest.mark.parametrize("ending", [None, KeyboardInterrupt, ServerError])
def test_server_and_its_workers_end_with_the_block(server, tmp_path, ending):
    try:
        with processes.running_server(*server) as url:
            assert urllib.request.urlopen(f"{url}/health").status == 200
            worker = int((tmp_path / "pid").read_text())
            assert alive(worker)
            if ending:
                raise ending
    except (KeyboardInterrupt, ServerError):
        pass
    assert gone(worker)


def test_server_ends_when_its_parent_is_killed(server, tmp_path):
    command, port, log = server
    code = (
        "import sys, time; from pathlib import Path; from misa_vllm.processes import running_server\n"
        f"with running_server({command!r}, {port}, Path({str(log)!r})): time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert b"Server up" in process.stdout.readline()
    worker = int((tmp_path / "pid").read_text())
    assert alive(worker)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert gone(worker)


def test_server_that_stops_is_told_with_its_last_lines(tmp_path):
    command = [sys.executable, "-c", "print('because of this'); raise SystemExit(7)"]
    with pytest.raises(ServerError, match="because of this\n.*status 7"):
        with processes.running_server(command, processes.free_port(), tmp_path / "log"):
            pytest.fail("it never answered")


def test_server_that_is_slow_is_given_up(server, tmp_path):
    command, port, log = server
    with pytest.raises(ServerError, match="did not answer within 0 s"):
        with processes.running_server(command, port, log, timeout=0):
            pytest.fail("it had no time to answer")
