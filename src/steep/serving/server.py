"""`steep chat --serve`: an existing server as a process of its own, on loopback, with an OpenAI-compatible endpoint.

In: the files of a model. Out: the address, once the server answers. The process ends with the `with` block. steep has no server:
those of transformers, llama.cpp and vLLM are kept by others and faster than one of ours would be.
"""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from steep.core.errors import ConfigError, SteepError
from steep.core.plugins import load_plugin, plugin_names
from steep.serving.served_model import LOOPBACK, ServedModel

SERVERS = "steep.serving.servers"
FUNCTIONS = ("why_not", "command")
PREFERRED = ("vllm", "transformers", "llama_cpp")
"""The order of `auto`; those that are not named here follow."""
START_SECONDS = 600.0
"""How long a server may take to load its model."""
LAST_LINES = 15


@dataclass(frozen=True)
class RunningServer:
    """A server that answers."""

    name: str
    url: str
    """The base of the endpoint, for `base_url` of a client: http://127.0.0.1:PORT/v1."""
    process: subprocess.Popen[bytes]


def choose_server(model: ServedModel, name: str = "auto") -> str:
    """The server that is asked for, or the first that can serve the model here.

    Raises ConfigError with the reason of each server that cannot.
    """
    if name != "auto":
        reason = load_plugin(SERVERS, name, FUNCTIONS, "--server").why_not(model)
        if reason is not None:
            raise ConfigError(f"--server {name}: {reason}")
        return name
    names = sorted(plugin_names(SERVERS), key=lambda each: (each not in PREFERRED, _rank(each), each))
    reasons = {each: load_plugin(SERVERS, each, FUNCTIONS).why_not(model) for each in names}
    able = [each for each in names if reasons[each] is None]
    if not able:
        lines = "\n".join(f"  {each}: {reason}" for each, reason in reasons.items())
        raise ConfigError(f"no server that is installed here can serve {model.folder}:\n{lines}")
    return able[0]


def _rank(name: str) -> int:
    return PREFERRED.index(name) if name in PREFERRED else 0


@contextmanager
def running_server(model: ServedModel, name: str, port: int) -> Iterator[RunningServer]:
    """Start a server, wait until it answers, and stop it at the end of the block.

    name: from `choose_server`. Raises ConfigError for a port in use, SteepError with the server's last lines if it ends or does
    not answer within ten minutes.
    """
    check_port(port)
    plugin = load_plugin(SERVERS, name, FUNCTIONS, "--server")
    command = plugin.command(model, port)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            _wait(process, f"http://{LOOPBACK}:{port}{plugin.READY}", Path(command[0]).name, log)
            yield RunningServer(name, f"http://{LOOPBACK}:{port}/v1", process)
        finally:
            _stop(process)


def check_port(port: int) -> None:
    """Raises ConfigError if something listens on the port already: its answers would be taken for the server's."""
    with socket.socket() as probe:
        if probe.connect_ex((LOOPBACK, port)) == 0:
            raise ConfigError(f"--port {port}: another program listens on it; give another port")


def _wait(process: subprocess.Popen[bytes], address: str, program: str, log: IO[bytes]) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SteepError(f"{program} ended with code {process.returncode}:\n{_tail(log)}")
        if _answers(address):
            return
        time.sleep(0.2)
    raise SteepError(f"{program} did not answer within {START_SECONDS:.0f} s:\n{_tail(log)}")


def _answers(address: str) -> bool:
    try:
        # A proxy would be asked for loopback too, so none is used.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode("utf-8", errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-LAST_LINES:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process: asked first, killed after ten seconds."""
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
