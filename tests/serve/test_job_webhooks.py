"""News of jobs: each reaches every endpoint at least once, signed, and is known by its id when it comes again."""

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from sentences import refuses
from standardwebhooks import Webhook

from sora_train.errors import UserError
from sora_train.serving.jobs.job import Asked
from sora_train.serving.jobs.store import JobStore
from sora_train.serving.jobs.webhooks import MAX_ATTEMPTS, SENDING_SECONDS, Webhooks

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef01234567").decode()
ASKED = Asked("create", "a ring", "toy", 1.0, (64, 48))


class Receiver:
    """An endpoint that keeps what it gets; `answers` are its next ones, 200 when there are none."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[int] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.got.append(({k.lower(): v for k, v in self.headers.items()}, body))
                status = outer.answers.pop(0) if outer.answers else 200
                self.send_response(status)
                if status == 302:
                    self.send_header("location", "/elsewhere")
                self.send_header("content-length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                """Where a redirection would lead."""
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/news"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


class Sending:
    def __init__(self, url: str, endpoint: str):
        self.now = 1000.0
        self.store = JobStore(url, endpoints=[endpoint], clock=lambda: self.now)
        self.webhooks = Webhooks(self.store.database, {endpoint: SECRET})

    def end(self, failed: bool = False) -> str:
        job, _ = self.store.create("o", ASKED)
        lease = self.store.claim("w", lease_seconds=10)
        if failed:
            assert self.store.fail(lease, code="c", message="m")
        else:
            assert self.store.complete(lease, outputs={}, facts={}, usage={})
        return job.id


@pytest.fixture
def sending(database_url: str, receiver: Receiver) -> Iterator[Sending]:
    made = Sending(database_url, receiver.url)
    yield made
    made.store.database.close()


def test_news_is_signed_and_says_what_ended(sending: Sending, receiver: Receiver) -> None:
    completed, failed = sending.end(), sending.end(failed=True)
    assert sending.webhooks.send_due() == 2 and sending.webhooks.send_due() == 0
    kinds = []
    for headers, body in receiver.got:
        event = Webhook(SECRET).verify(body, headers)
        assert event["object"] == "event" and event["created_at"] == 1000
        assert event["id"] == headers["webhook-id"] and event["id"].startswith("evt_")
        kinds.append((event["type"], event["data"]["id"]))
        # The receivers of OpenAI's news take ours.
        client = openai.OpenAI(api_key="k", webhook_secret=SECRET)
        assert client.webhooks.unwrap(body, headers).type == event["type"]
        with pytest.raises(Exception, match="signature"):
            Webhook(SECRET).verify(body + b" ", headers)
    assert kinds == [("video.completed", completed), ("video.failed", failed)]


def test_what_did_not_arrive_comes_again_at_growing_pauses(
    sending: Sending, receiver: Receiver
) -> None:
    sending.end()
    receiver.answers = [500, 302, 404]
    waits = []
    for _ in range(3):
        assert sending.webhooks.send_due() == 1
        start = sending.now
        while not due(sending) and sending.now < start + 100:
            sending.now += 1
        waits.append(sending.now - start)
    assert waits == [5, 15, 45]
    assert sending.webhooks.send_due() == 1 and len(receiver.got) == 4
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert len({body for _, body in receiver.got}) == 1
    sending.now += 1e6
    assert sending.webhooks.send_due() == 0


def due(sending: Sending) -> bool:
    with sending.store.database.read() as connection:
        row = connection.exec_driver_sql("SELECT due FROM webhooks").one()
    return row.due is not None and row.due <= sending.now


def test_an_endpoint_that_is_away_is_given_up_after_a_day(
    sending: Sending, receiver: Receiver
) -> None:
    sending.end()
    receiver.server.shutdown()
    receiver.server.server_close()
    start = last = sending.now
    for _ in range(MAX_ATTEMPTS):
        while not due(sending):
            sending.now += 100
        last = sending.now
        assert sending.webhooks.send_due() == 1
    assert 18 * 3600 < last - start < 30 * 3600
    sending.now += 1e7
    assert sending.webhooks.send_due() == 0


def test_an_endpoint_of_one_owner_hears_of_no_other(database_url: str) -> None:
    store = JobStore(database_url, endpoints=["http://all", ("http://mine", "o")])
    for owner in ("o", "p"):
        job, _ = store.create(owner, ASKED)
        assert store.complete(store.claim("w", lease_seconds=9), outputs={}, facts={}, usage={})
    with store.database.read() as connection:
        rows = connection.exec_driver_sql("SELECT endpoint FROM webhooks ORDER BY number").all()
    assert [row.endpoint for row in rows] == ["http://all", "http://mine", "http://all"]
    store.database.close()


def test_gone_is_gone(sending: Sending, receiver: Receiver) -> None:
    sending.end()
    receiver.answers = [410]
    assert sending.webhooks.send_due() == 1
    sending.now += 1e6
    assert sending.webhooks.send_due() == 0 and len(receiver.got) == 1


def test_news_of_a_sender_that_died_is_sent_by_another(
    sending: Sending, receiver: Receiver
) -> None:
    sending.end()
    assert sending.webhooks._taken() is not None  # and then it is killed
    assert sending.webhooks.send_due() == 0
    sending.now += SENDING_SECONDS + 1
    assert sending.webhooks.send_due() == 1 and len(receiver.got) == 1


def test_many_senders_do_not_send_the_same(sending: Sending, receiver: Receiver) -> None:
    ended = {sending.end() for _ in range(12)}
    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(lambda _: sending.webhooks.send_due(), range(4))) == 12
    assert sorted(json.loads(body)["data"]["id"] for _, body in receiver.got) == sorted(ended)


def test_a_secret_that_is_none_is_refused(sending: Sending) -> None:
    with refuses(UserError, "http://x", "whsec_"):
        Webhooks(sending.store.database, {"http://x": "whsec_ä"})


def test_who_leaves_does_not_wait_for_endpoints_that_are_away(
    sending: Sending, receiver: Receiver
) -> None:
    for _ in range(4):
        sending.end()
    leaving = threading.Event()
    leaving.set()
    receiver.answers = [200, 500, 200]
    assert sending.webhooks.send_due(stop=leaving) == 2 and len(receiver.got) == 2
