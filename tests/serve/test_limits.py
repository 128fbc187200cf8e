"""Keys, limits and bills: as they were given, for many at once and for several gateways, on both databases."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
from sentences import refuses
from stub_backend import PRICES

from sora_train.errors import UserError
from sora_train.serving.access.audit import Audit
from sora_train.serving.access.billed import month_start, used_since
from sora_train.serving.access.keys import DAY, Key, Keys
from sora_train.serving.access.limits import Limits
from sora_train.serving.access.prices import Prices
from sora_train.serving.errors import ApiError, TooManyRequests, Unauthorized, Unavailable
from sora_train.serving.jobs.job import Asked, Job
from sora_train.serving.jobs.store import JobStore
from sora_train.serving.settings import LimitSettings, PriceSettings

MARCH = datetime(2026, 3, 31, 23, 59, 0, tzinfo=UTC).timestamp()
ROWS = tuple(PriceSettings.model_validate(row) for row in PRICES)


class Gateway:
    """What a gateway has of a database; several may have the same."""

    def __init__(self, url: str, **limits):
        self.now = MARCH
        self.store = JobStore(url, clock=lambda: self.now)
        self.keys = Keys(self.store.database)
        self.prices = Prices(ROWS)
        settings = LimitSettings.model_validate(limits)
        self.limits = Limits(self.store.database, settings, self.prices)

    def ask(self, key: Key | None, seconds: float = 4.0, **values) -> Job:
        asked = Asked("create", "a", "tiny", seconds, (64, 48), **values)
        owner = key.id if key else "local"
        room = lambda connection: self.limits.require_room(connection, key, asked)  # noqa: E731
        return self.store.create(owner, asked, room=room)[0]

    def finish(self, fails: bool = False) -> None:
        lease = self.store.claim("w", lease_seconds=9)
        if fails:
            assert self.store.fail(lease, code="c", message="m")
            return
        facts = {"new_seconds": lease.job.asked.seconds, "size": [64, 48]}
        usage = self.prices.usage(lease.job, facts)
        assert self.store.complete(lease, outputs={"video": "v"}, facts=facts, usage=usage)

    def used(self, key: Key) -> dict:
        with self.store.database.read() as connection:
            return used_since(connection, key.id, month_start(self.now))


@pytest.fixture
def gateways(database_url: str) -> list[Gateway]:
    return [Gateway(database_url, requests_per_minute=6, concurrent=3) for _ in range(3)]


@pytest.fixture
def gateway(gateways: list[Gateway]) -> Gateway:
    return gateways[0]


def outcome(call) -> str:
    try:
        call()
    except ApiError as error:
        return str(error.code)
    return "taken"


# --- keys ---


def test_a_secret_is_nowhere_in_the_database(tmp_path):
    gateway = Gateway(f"sqlite:///{tmp_path}/jobs.db")
    key, secret = gateway.keys.add("alice")
    stored = "\n".join(sqlite3.connect(tmp_path / "jobs.db").iterdump())
    assert key.id in stored and secret not in stored and secret[8:30] not in stored
    assert len(secret) > 40 and secret.endswith(key.ends_with)


def test_keys_open_until_they_are_revoked_or_expire(gateway: Gateway):
    for_ever, secret = gateway.keys.add("alice")
    short, other = gateway.keys.add("bob", days=1)

    def owner(header: str | None) -> Key | None:
        return gateway.keys.owner_of(header, may_be_local=True)

    assert owner(f"Bearer {secret}") == for_ever and owner(f"bearer  {other} ") == short
    gateway.now += DAY - 1
    assert owner(f"Bearer {other}") == short
    gateway.now += 1
    with refuses(Unauthorized, "expired"):
        owner(f"Bearer {other}")
    gateway.keys.revoke("alice")
    with refuses(Unauthorized, "revoked"):
        owner(f"Bearer {secret}")
    for wrong in (None, "", "Bearer", f"Basic {secret}", f"Bearer {secret}x", "Bearer ' OR 1=1 --"):
        with pytest.raises(Unauthorized):
            owner(wrong)
    states = {key.name: key.state(gateway.now) for key in gateway.keys.all()}
    assert states == {"alice": "revoked", "bob": "expired"}


def test_no_key_is_needed_here_until_there_is_one(gateway: Gateway):
    assert gateway.keys.owner_of(None, may_be_local=True) is None
    assert gateway.keys.owner_of("Bearer any", may_be_local=True) is None
    for header in (None, "Bearer any"):
        with pytest.raises(Unauthorized):
            gateway.keys.owner_of(header, may_be_local=False)
    gateway.keys.add("alice")
    gateway.keys.revoke("alice")
    with pytest.raises(Unauthorized):
        gateway.keys.owner_of(None, may_be_local=True)


def test_revoking_names_one_key(gateway: Gateway):
    first, _ = gateway.keys.add("alice")
    gateway.keys.add("alice")
    with refuses(UserError, "2 keys", "alice"):
        gateway.keys.revoke("alice")
    assert gateway.keys.revoke(first.id) == first
    gateway.keys.revoke("alice")
    with refuses(UserError, "no key", "alice"):
        gateway.keys.revoke("alice")


# --- limits ---


def test_requests_a_minute_hold_over_several_gateways(gateways: list[Gateway]):
    key, _ = gateways[0].keys.add("alice")
    calls = [lambda gateway=gateway: gateway.limits.count_request(key) for gateway in gateways * 8]
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(outcome, calls))
    assert outcomes.count("taken") == 6 and outcomes.count("rate_limit_exceeded") == 18
    for gateway in gateways:
        gateway.now += 9.0
    with pytest.raises(TooManyRequests) as early:
        gateways[1].limits.count_request(key)
    assert early.value.headers == {"retry-after": "1", "retry-after-ms": "1000"}
    gateways[1].now += 1.0
    gateways[1].limits.count_request(key)
    assert outcome(lambda: gateways[1].limits.count_request(key)) == "rate_limit_exceeded"


@pytest.mark.parametrize("own", [None, 2, 0])
def test_jobs_at_once_hold_over_several_gateways(gateways: list[Gateway], own: int | None):
    key, _ = gateways[0].keys.add("alice", concurrent=own)
    calls = [lambda gateway=gateway: gateway.ask(key) for gateway in gateways * 4]
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(outcome, calls))
    most = {None: 3, 2: 2, 0: 12}[own]
    assert outcomes.count("taken") == most
    assert outcomes.count("concurrency_limit_exceeded") == 12 - most
    gateways[0].finish()
    assert outcome(lambda: gateways[1].ask(key)) == "taken"


@pytest.mark.parametrize("by", ["seconds", "cost"])
def test_quotas_count_what_was_billed_and_what_runs(gateway: Gateway, by: str):
    most = {"seconds_per_month": 10.0} if by == "seconds" else {"cost_per_month": 1.0}
    key, _ = gateway.keys.add("alice", **most)
    job = gateway.ask(key)
    gateway.finish()
    assert gateway.store.delete(job.id, key.id), "what is deleted was made all the same"
    gateway.ask(key)
    assert outcome(lambda: gateway.ask(key)) == "insufficient_quota"
    gateway.finish(fails=True)
    gateway.ask(key)
    assert outcome(lambda: gateway.ask(key, seconds=2.5)) == "insufficient_quota"
    gateway.ask(key, seconds=2.0)
    gateway.now += 60.0  # April
    gateway.finish()
    assert outcome(lambda: gateway.ask(key, seconds=4.0)) == "taken"


def test_quotas_hold_over_several_gateways(gateways: list[Gateway]):
    key, _ = gateways[0].keys.add("alice", concurrent=0, seconds_per_month=10.0)
    calls = [lambda gateway=gateway: gateway.ask(key, seconds=3.0) for gateway in gateways * 4]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outcome, calls)).count("taken") == 3


def test_a_full_queue_takes_nobody(database_url: str):
    gateway = Gateway(database_url, queue=2)
    for _ in range(2):
        gateway.ask(None)
    with refuses(Unavailable, "waiting"):
        gateway.ask(None)
    gateway.store.claim("w", lease_seconds=9)
    gateway.ask(None)


# --- bills ---


def test_usage_is_kept_for_what_was_delivered_alone(gateway: Gateway):
    key, _ = gateway.keys.add("alice")
    for fails in (False, True, False):
        gateway.ask(key, seconds=2.0)
        gateway.finish(fails)
    cancelled = gateway.ask(key)
    gateway.store.delete(cancelled.id, key.id)
    assert gateway.used(key) == {"seconds": 4.0, "cost": pytest.approx(0.4), "videos": 2}
    (row,) = gateway.keys.report()
    assert (row["used_seconds"], row["used_videos"], row["state"]) == (4.0, 2, "active")


@pytest.mark.parametrize(
    ("model", "size", "rows", "side", "cost"),
    [
        ("tiny", (64, 48), PRICES, "48p", 0.2),
        ("tiny", (64, 50), PRICES, "720p", 1.0),
        ("tiny", (720, 1280), PRICES, "720p", 1.0),
        ("tiny", (1920, 1080), PRICES, "1080p", 0.0),
        ("other", (64, 48), PRICES, "240p", 0.0),
        ("other", (64, 48), [*PRICES, {"per_second": 3.0}], f"{1 << 20}p", 6.0),
        ("tiny", (1920, 1080), [*PRICES, {"up_to": 1080, "per_second": 3.0}], "1080p", 6.0),
        ("other", (4000, 4000), [], "2160p", 0.0),
    ],
)
def test_prices_by_model_and_size(model: str, size, rows: list, side: str, cost: float):
    prices = Prices(tuple(PriceSettings.model_validate(row) for row in rows), "EUR")
    assert prices.of(model, size, 2.0) == {
        "model": model,
        "size_class": side,
        "seconds": 2.0,
        "cost": pytest.approx(cost),
        "currency": "EUR",
    }


def test_the_audit_log_shares_the_fate_of_its_transaction(gateway: Gateway):
    audit = Audit(gateway.store.database)
    audit.note("a", owner="o", subject="s", request="req_1", detail_of=3)
    with pytest.raises(ZeroDivisionError), gateway.store.database.write() as connection:
        audit.note("b", owner="o", connection=connection)
        raise ZeroDivisionError
    (line,) = audit.lines()
    assert (line["event"], line["owner"], line["detail"]) == ("a", "o", {"detail_of": 3})
    assert audit.lines(owner="p") == []
