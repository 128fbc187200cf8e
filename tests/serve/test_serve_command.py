"""`sora serve` as a person starts it: keys, the addresses that need one, and a gateway with a worker of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from sentences import refuses

from sora_train.cli import run
from sora_train.errors import UserError
from sora_train.serving.access.audit import Audit
from sora_train.serving.service import open_store
from sora_train.serving.settings import Settings


def test_keys_are_added_listed_and_revoked(tmp_path: Path, capsys):
    data = ["--data", str(tmp_path)]
    run(["serve", "keys", "add", "alice", "--days", "3", "--concurrent", "2", *data])
    told = capsys.readouterr().out
    secret = re.search(r"^sk-sora-\S{40,}$", told, re.MULTILINE)[0]
    run(["serve", "keys", "ls", "--json", *data])
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["state"], row["concurrent"]) == ("alice", "active", 2)
    assert row["ends_with"] == secret[-4:] and secret not in str(row)
    run(["serve", "keys", "revoke", "alice", *data])
    capsys.readouterr()
    run(["serve", "keys", "ls", *data])
    assert re.search(r"alice +\S{4} +revoked", capsys.readouterr().out)
    store = open_store(Settings.read(None, data=str(tmp_path)))
    events = [line["event"] for line in Audit(store.database).lines()]
    assert events == ["key.revoked", "key.added"]
    assert not any(secret in str(line) for line in Audit(store.database).lines())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.3", "serve.example"])
def test_addresses_that_others_reach_need_a_key(tmp_path: Path, host: str):
    flags = ["--ckpt", "any", "--data", str(tmp_path), "--port", "0"]
    with refuses(UserError, host, "sora serve keys add"):
        run(["serve", "--host", host, *flags])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve"], ["--ckpt"]),
        (["serve", "--ckpt", "nowhere"], ["nowhere"]),
        (["serve", "--port", "70000", "--ckpt", "a"], ["port", "70000"]),
        (["serve", "--port", "1", "keys", "ls"], ["--port", "behind"]),
        (["serve", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["serve", "keys", "ls", "--database", "mysql://a/b"], ["mysql", "postgresql"]),
        (["serve", "keys", "revoke", "nobody"], ["nobody"]),
        (["serve", "keys", "add"], ["NAME"]),
        (["serve", "keys", "add", "a", "--days", "-1"], ["days"]),
        (["serve", "worker"], ["--ckpt"]),
    ],
    ids=" ".join,
)
def test_what_cannot_start_says_why(tmp_path: Path, monkeypatch, arguments: list, words: list):
    monkeypatch.chdir(tmp_path)
    with refuses(UserError, *words):
        run(arguments)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 3", ["prot", "port", "serve.yaml"]),
        ("port: many", ["port", "many", "serve.yaml"]),
        ("limits: {concurrent: -1}", ["limits.concurrent", "-1"]),
        ("size: 33x32", ["size", "33x32", "1280x720"]),
        ("prices: [{model: a, per_second: -1}]", ["per_second", "-1"]),
        ("backend: 3", ["backend", "3"]),
        ("nonsense: 1", ["nonsense", "sora serve --settings"]),
        ("webhooks: [{url: http://a}]\nsafety: {policy: none}\nwatermark_key: none", []),
    ],
)
def test_settings_that_are_wrong_are_named(tmp_path: Path, text: str, words: list):
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    if not words:
        assert Settings.read(file).webhooks[0].url == "http://a"
        return
    with refuses(UserError, *words):
        Settings.read(file)


def test_flags_stand_over_the_file(tmp_path: Path):
    file = tmp_path / "serve.yaml"
    file.write_text("port: 3\nbackend: {ckpt: a, adapters: {b: c}}")
    read = Settings.read(file, port=4, backend__ckpt="d", host=None)
    assert (read.port, read.backend.ckpt, read.backend.adapters) == (4, "d", {"b": "c"})


def test_every_setting_is_listed(capsys):
    run(["serve", "--settings"])
    told = capsys.readouterr().out
    for name in ("host", "limits.concurrent", "prices[].per_second", "signing.dev_cert"):
        assert re.search(rf"^{re.escape(name)}: .*\n    \S", told, re.MULTILINE), name


@pytest.mark.parametrize("kills", [False, True], ids=["told", "killed"])
def test_a_gateway_takes_its_workers_along(tmp_path: Path, kills: bool):
    program = tmp_path / "start.py"
    program.write_text(START)
    data = tmp_path / "data"
    server = subprocess.Popen(
        [sys.executable, str(program), str(data)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )
    try:
        address = re.search(r"http://127.0.0.1:\d+", server.stdout.readline())[0]
        with urllib.request.urlopen(f"{address}/readyz", timeout=60) as answer:
            assert answer.status == 200
        until((data / "pid").exists)
        worker = int((data / "pid").read_text())
        server.send_signal(signal.SIGKILL if kills else signal.SIGTERM)
        assert server.wait(60) == (-signal.SIGKILL if kills else 0)
        until(lambda: not is_alive(worker))
    finally:
        server.kill()


def until(holds) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


START = """
import sys
from pathlib import Path
from stub_backend import StubBackend
from sora_train.serving import gateway
from sora_train.serving.settings import Settings

data = Path(sys.argv[1])
WORKER = '''
import os, sys, threading
from pathlib import Path
from sora_train.serving.worker_process import leave_with_parent

leave_with_parent()
data = Path(sys.argv[1])
(data / "pid.tmp").write_text(str(os.getpid()))
(data / "pid.tmp").rename(data / "pid")
threading.Event().wait(120)
'''
gateway.worker_command = lambda config: [sys.executable, "-c", WORKER, str(data)]
gateway.open_backend = lambda settings: StubBackend()
gateway.run(Settings.read(None, data=str(data), port=0, safety__policy="none"))
"""
