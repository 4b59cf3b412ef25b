"""`steep push`: what is refused before any work, and an upload through huggingface_hub to a small hub on loopback.

The hub is written here after the requests that huggingface_hub makes; no real hub can be reached by a test.
"""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import steep
from steep.core.errors import ConfigError
from steep.exporters.push import check_repository


class Hub(BaseHTTPRequestHandler):
    """Keeps what is committed in `server.files`, the repositories made in `server.repositories`."""

    server: Any

    def log_message(self, *arguments: object) -> None:
        """Nothing on standard error."""

    def answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        if self.path.startswith("/api/whoami"):
            known = self.headers.get("Authorization") == "Bearer hf_right"
            self.answer({"name": "ada", "type": "user"} if known else {"error": "Invalid token"}, 200 if known else 401)
        else:
            self.answer({"id": "ada/tiny", "sha": "0" * 40, "siblings": [], "private": self.server.private})

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.large[hashlib.sha256(data).hexdigest()] = data
        self.answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/repos/create":
            self.server.repositories.append(json.loads(body))
            self.answer({"url": f"{address}/ada/tiny", "name": "ada/tiny"})
        elif self.path == "/api/validate-yaml":  # the metadata of the model card
            self.answer({"errors": [], "warnings": []})
        elif "/branch/" in self.path:
            self.server.repositories.append({"branch": self.path.rpartition("/")[2]})
            self.answer({})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            self.answer({"files": [
                {"path": file["path"], "uploadMode": modes[file["path"].endswith(".safetensors")], "shouldIgnore": False}
                for file in files
            ]})  # fmt: skip
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            self.answer({"transfer": "basic", "objects": [
                {"oid": each["oid"], "size": each["size"], "actions": {"upload": {"href": f"{address}/large/{each['oid']}"}}}
                for each in objects
            ]})  # fmt: skip
        elif "/commit/" in self.path and self.server.breaks:
            self.close_connection = True
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.large[value["oid"]]
                else:
                    self.server.messages.append(value["summary"])
            self.answer({"commitUrl": f"{address}/ada/tiny/commit/1", "commitOid": "1" * 40, "success": True})
        else:
            self.answer({"error": f"not known here: {self.path}"}, 404)


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.large, server.repositories, server.messages = {}, {}, [], []
    server.private, server.breaks = True, False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of an export, small."""
    made = tmp_path / "export"
    made.mkdir()
    (made / "config.json").write_text('{"model_type": "llama"}')
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (made / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# tiny\n")
    return made


def push(folder: Path, hub: Any, *options: str, token: str = "hf_right") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: huggingface_hub reads its environment once."""
    address = f"http://127.0.0.1:{hub.server_port}"
    environment = {
        "HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HOME": str(folder.parent / "home"), "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1", "PATH": "", "PYTHONPATH": str(Path(steep.__file__).parents[1]),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "steep", "push", str(folder), "ada/tiny", *options],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_an_export_arrives_byte_for_byte_in_a_private_repository(folder: Path, hub: Any) -> None:
    done = push(folder, hub, "--message", "first", "--revision", "trial")
    assert done.returncode == 0, done.stderr
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.repositories[0]["name"] == "tiny"
    assert (hub.repositories[0].get("visibility"), hub.repositories[0].get("private")) in (
        ("private", None),
        (None, True),
    )
    assert {"branch": "trial"} in hub.repositories
    assert hub.messages == ["first"]
    assert "to ada/tiny (private)" in done.stderr
    assert "/ada/tiny/commit/1" in done.stdout
    assert "hf_right" not in done.stdout + done.stderr


def test_a_public_repository_that_is_there_is_asked_for(folder: Path, hub: Any) -> None:
    hub.private = False  # whatever is asked for: a repository stays what it is
    done = push(folder, hub)
    assert done.returncode == 2
    assert "ada/tiny is public: give --public" in done.stderr
    assert not hub.files
    done = push(folder, hub, "--public")
    assert done.returncode == 0, done.stderr
    assert "to ada/tiny (public)" in done.stderr
    assert hub.messages == ["export, exported by steep"]


def test_a_connection_that_breaks_is_an_error_and_no_traceback(folder: Path, hub: Any) -> None:
    hub.breaks = True
    done = push(folder, hub)
    assert done.returncode == 1
    assert "error: ada/tiny: the upload failed (" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_login_is_refused_before_anything_is_made(folder: Path, hub: Any) -> None:
    done = push(folder, hub, token="hf_wrong")
    assert done.returncode == 2
    assert "you are not logged in to the hub" in done.stderr
    assert "hf auth login" in done.stderr
    assert "hf_wrong" not in done.stderr
    assert not hub.repositories


def test_no_hub_is_said_before_anything_is_exported(folder: Path) -> None:
    with pytest.raises(ConfigError, match="nothing can be pushed: the hub is switched off here"):
        steep.push(folder, "ada/tiny")


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "ada/ti ny", "", "ada/"])
def test_a_name_that_is_no_repository_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a repository: give USER/NAME"):
        check_repository(name)
