"""What gateway and workers of `sora serve` are made of, opened from the settings once."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from sora_train.errors import UserError
from sora_train.serving.access.audit import Audit
from sora_train.serving.access.keys import Keys
from sora_train.serving.access.limits import Limits
from sora_train.serving.access.prices import Prices
from sora_train.serving.jobs.files import FileStore
from sora_train.serving.jobs.store import JobStore
from sora_train.serving.settings import Settings

if TYPE_CHECKING:
    from sora_train.serving.backends.base import Backend
    from sora_train.serving.safety.policy import Policy


@dataclass(frozen=True)
class Service:
    """The parts; `policy` is None where everything is made."""

    settings: Settings
    store: JobStore
    files: FileStore
    backend: Backend
    keys: Keys
    limits: Limits
    prices: Prices
    audit: Audit
    policy: Policy | None = None

    @classmethod
    def open(cls, settings: Settings, backend: Backend, policy: Policy | None = None) -> Service:
        """Open database and files. Raises UserError for an address of another kind, DatabaseAway."""
        store = open_store(settings)
        prices = Prices(settings.prices, settings.currency)
        return cls(
            settings,
            store,
            FileStore(settings.files_url),
            backend,
            Keys(store.database),
            Limits(store.database, settings.limits, prices),
            prices,
            Audit(store.database),
            policy,
        )

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.store.database.close()


def open_store(settings: Settings) -> JobStore:
    """The jobs, and beside them in the same database the keys and the audit log. Raises UserError, DatabaseAway."""
    try:
        # Prompts and uploads of all keys lie in it.
        settings.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the data folder {settings.folder} cannot be made: {error.strerror}; choose another --data"
        ) from None
    endpoints = [(hook.url, hook.key) if hook.key else hook.url for hook in settings.webhooks]
    return JobStore(settings.database_url, endpoints=endpoints)
