"""A request that is taken in is one job with its files, whatever happens to the answer of the database."""

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sql
from starlette.testclient import TestClient
from stub_backend import HOME, Server, clip, picture

from sora_train.serving.api.app import build_app
from sora_train.serving.jobs.job import DatabaseAway


@pytest.fixture
def server(tmp_path: Path) -> Server:
    made = Server(tmp_path)
    made.http = TestClient(made.app, base_url=HOME, raise_server_exceptions=False)
    return made


def lose_answers(server: Server, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Jobs are committed, and their gateway does not hear of it."""
    create = server.service.store.create
    lost = []

    def losing(*args, **given):
        made = create(*args, **given)
        if len(lost) < times:
            lost.append(made)
            raise DatabaseAway("the connection broke")
        return made

    monkeypatch.setattr(server.service.store, "create", losing)


def stored(server: Server) -> list[Path]:
    files = server.service.settings.folder / "files"
    return [path for path in files.rglob("*") if path.is_file()]


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "one"}])
def test_a_job_whose_commit_was_not_answered_is_answered_once(server, monkeypatch, headers):
    lose_answers(server, monkeypatch, 1)
    asked = {"data": {"prompt": "a"}, "files": {"image": picture()}}
    answer = server.http.post("/v1/videos", **asked, headers=headers)
    assert answer.status_code == 200, answer.text
    assert [one["id"] for one in server.http.get("/v1/videos").json()["data"]] == [
        answer.json()["id"]
    ]
    assert server.work().status == "completed"


def test_a_job_that_may_be_there_keeps_its_files(server, monkeypatch):
    lose_answers(server, monkeypatch, 9)
    asked = {"data": {"prompt": "a"}, "files": {"image": picture()}}
    assert server.http.post("/v1/videos", **asked).status_code == 503
    assert server.work().status == "completed"


def test_a_repeated_request_leaves_no_files_of_its_own(server, monkeypatch):
    asked = {"data": {"prompt": "a"}, "files": {"image": picture()}}
    headers = {"Idempotency-Key": "one"}
    first = server.http.post("/v1/videos", **asked, headers=headers).json()
    lose_answers(server, monkeypatch, 1)
    assert server.http.post("/v1/videos", **asked, headers=headers).json()["id"] == first["id"]
    assert len(stored(server)) == 1


def test_the_log_of_a_database_that_refuses_has_no_prompts(server, caplog):
    with server.service.store.database.write() as connection:
        refusing = "CREATE TRIGGER no BEFORE INSERT ON jobs BEGIN SELECT RAISE(ABORT, 'full'); END"
        connection.execute(sql.text(refusing))
    answer = server.http.post("/v1/videos", json={"prompt": "a secret garden"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] in caplog.text
    assert "INSERT INTO jobs" in caplog.text and "secret" not in caplog.text


def test_a_gateway_that_starts_leaves_the_uploads_of_others_alone(server, tmp_path):
    folder = server.service.settings.folder / "incoming"
    for name, age in (("old", 7 * 3600), ("new", 60)):
        (folder / name).mkdir()
        os.utime(folder / name, (time.time() - age,) * 2)
    Server(tmp_path)
    assert [place.name for place in folder.iterdir()] == ["new"]


def test_slow_pictures_do_not_keep_others_from_looking(tmp_path):
    import httpx2 as httpx
    import uvicorn

    server, hold = Server(tmp_path), threading.Event()
    began = threading.Semaphore(0)

    def fetch(url: str) -> bytes:
        began.release()
        assert hold.wait(60)
        return picture()

    app = build_app(server.service, fetch=fetch)
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(60) as pool:
        threading.Thread(target=running.run, args=([listener],), daemon=True).start()
        home = f"http://127.0.0.1:{listener.getsockname()[1]}"
        asked = {"prompt": "a", "input_reference": {"image_url": "https://a.example/slow"}}
        try:
            sent = [
                pool.submit(httpx.post, f"{home}/v1/videos", json=asked, timeout=120)
                for _ in range(50)
            ]
            assert began.acquire(timeout=30)
            time.sleep(1)  # the others wait for a thread
            assert httpx.get(f"{home}/v1/videos", timeout=20).json()["data"] == []
        finally:
            hold.set()
        assert {one.result().status_code for one in sent} == {200}
        running.should_exit = True


def test_characters_are_so_many_and_end_with_their_clips(tmp_path):
    server = Server(tmp_path, limits={"characters": 2})
    key, other = server.as_(server.key("a")), server.as_(server.key("b"))

    def add(client: TestClient):
        path = "/v1/videos/characters"
        return client.post(path, data={"name": "Zork"}, files={"video": clip()})

    made = [add(key).json()["id"] for _ in range(2)]
    refused = add(key)
    assert refused.status_code == 429 and refused.headers["x-should-retry"] == "false"
    assert add(other).status_code == 200 and len(stored(server)) == 3
    path = f"/v1/videos/characters/{made[0]}"
    assert other.delete(path).status_code == 404
    gone = {"id": made[0], "object": "character.deleted", "deleted": True}
    assert key.delete(path).json() == gone
    assert key.delete(path).status_code == key.get(path).status_code == 404
    assert len(stored(server)) == 2 and add(key).status_code == 200


def test_a_remix_with_a_character_that_is_gone_is_refused(server):
    path = "/v1/videos/characters"
    made = server.http.post(path, data={"name": "Zork"}, files={"video": clip()}).json()["id"]
    server.http.post("/v1/videos", json={"prompt": "a", "characters": [made]})
    video = server.work()
    assert server.http.delete(f"{path}/{made}").status_code == 200
    answer = server.http.post(f"/v1/videos/{video.id}/remix", json={"prompt": "b"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "characters"


def test_the_data_folder_is_for_its_owner_alone(tmp_path):
    folder = Server(tmp_path / "data").service.settings.folder
    assert folder.stat().st_mode & 0o077 == 0
