"""`sora fetch` against a hub that answers over HTTP: what it takes and says, and that no network is needed then."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sentences import says

COMMIT = "c" * 40
FILES = {
    "model_index.json": b"{}",
    "transformer/model.safetensors": b"t" * 5000,
    "vae/config.json": b"{}",
    "vae/model.safetensors": b"v" * 1000,
    "vae/picture.png": b"p",
    "text_encoder/config.json": b"{}",
    "text_encoder/model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors"}}',
    "text_encoder/model-1.safetensors": b"e" * 2000,
    "tokenizer/tokenizer.json": b"{}",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository, someone/pipeline, by the calls that huggingface_hub makes."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/someone/pipeline/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": oid(data)}
                for name, data in FILES.items()
            ]
            self.send(json.dumps(entries).encode(), body)
        elif path.startswith("/api/models/someone/pipeline"):
            told = {
                "id": "someone/pipeline",
                "sha": COMMIT,
                "siblings": [{"rfilename": name} for name in FILES],
            }
            self.send(json.dumps(told).encode(), body)
        elif path.startswith("/someone/pipeline/resolve/"):
            name = path.split("/", 5)[-1]
            self.send(FILES[name], body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def send(self, data: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{oid(data)}"')
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Tests are quiet."""


def oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


TEXT = ["text.kind=umt5", "text.trainable=false"]
NAMED = [
    "experiment=parity_tiny",
    "vae=tiny",
    "vae.path=someone/pipeline",
    *TEXT,
    "text.path=someone/pipeline",
]


def sora(folder: Path, *words: str, **environ: str) -> subprocess.CompletedProcess:
    variables = os.environ | {"HF_HOME": str(folder / "hub"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    variables.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "sora_train", *words]
    return subprocess.run(
        command, env=variables | environ, capture_output=True, text=True, check=False, cwd=folder
    )


def test_what_a_run_names_is_brought_once_and_then_found_offline(
    endpoint: str, tmp_path: Path
) -> None:
    launch = ["launch", "local", *NAMED, "--print"]
    before = sora(tmp_path, *launch)
    assert before.returncode == 2 and before.stderr.count("\n") == 1
    assert "vae.path=someone/pipeline" in before.stderr and "sora fetch" in before.stderr

    first = sora(tmp_path, "fetch", *NAMED, HF_ENDPOINT=endpoint)
    assert first.returncode == 0, first.stderr
    vae, text = [line for line in first.stdout.splitlines() if "fetching" not in line]
    says(vae, "vae.path=someone/pipeline", "fetched", "1 kB", "2 files")
    says(text, "text.path=someone/pipeline", "fetched", "2.05 kB", "4 files")
    folder = Path(vae.rpartition(", ")[2])
    brought = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert brought == {name for name in FILES if name.startswith(("vae/", "text", "tok"))} - {
        "vae/picture.png"
    }

    again = sora(tmp_path, "fetch", *NAMED, HF_ENDPOINT=endpoint)
    assert again.stdout.count("was there already") == 2 and "fetching" not in again.stdout

    assert sora(tmp_path, *launch).returncode == 0
    (folder / "text_encoder/model-1.safetensors").unlink()
    after = sora(tmp_path, *launch)
    says(after.stderr, "model-1.safetensors", "cache")
    assert after.returncode == 2


@pytest.mark.parametrize(
    "words, environ, code, facts",
    [
        (["vae.path=someone/else"], {}, 2, ("no model of the hub",)),
        (["vae.path=nowhere"], {}, 2, ("no folder",)),
        ([], {"HF_ENDPOINT": "http://127.0.0.1:9"}, 1, ("cannot be fetched",)),
        ([], {"HF_HUB_OFFLINE": "1"}, 2, ("HF_HUB_OFFLINE",)),
    ],
)
def test_what_cannot_be_fetched_is_told_in_a_sentence(
    endpoint: str,
    tmp_path: Path,
    words: list[str],
    environ: dict[str, str],
    code: int,
    facts: tuple[str, ...],
) -> None:
    done = sora(tmp_path, "fetch", *NAMED, *words, **{"HF_ENDPOINT": endpoint} | environ)
    assert done.returncode == code, done.stderr
    says(done.stderr, *facts)
    assert "vae.path=" in done.stderr and done.stderr.count("\n") == 1


def test_a_run_of_the_package_s_own_weights_needs_none(tmp_path: Path) -> None:
    done = sora(tmp_path, "fetch", "experiment=quickstart")
    assert done.returncode == 0 and "no weights" in done.stdout
