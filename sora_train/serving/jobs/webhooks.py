"""News of jobs that ended, sent to the endpoints of the settings: at least once each, signed as standard-webhooks.

A row of the table is one message to one endpoint. Who sends it first moves its time on, as a lease: a sender that dies
leaves it to the next one, and receivers know a repetition by the message's id.
"""

import importlib
import json
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sql

from sora_train.errors import UserError
from sora_train.serving.jobs.database import Database
from sora_train.serving.jobs.tables import WEBHOOKS

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 10.0
SENDING_SECONDS = 60.0
FIRST_PAUSE_SECONDS, GROWTH, LONGEST_PAUSE_SECONDS = 5.0, 3, 6 * 3600.0
MAX_ATTEMPTS = 12
"""The last comes a day after the first."""
GONE = 410
"""By this answer an endpoint says that it wants no more of it."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A message goes where the settings say, or nowhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Webhooks:
    """Sends what is due."""

    def __init__(self, database: Database, secrets: Mapping[str, str]):
        """
        Args:
            secrets: `whsec_...` of each endpoint by its address.

        Raises:
            UserError: a secret that is none.
        """
        self.database, self.signers = database, {}
        for endpoint, secret in secrets.items():
            self.signers[endpoint] = _signer(endpoint, secret)
        self.open = urllib.request.build_opener(_NoRedirects).open

    def send_due(self, most: int = 100, stop: threading.Event | None = None) -> int:
        """Send what is due, and note what came of it; returns how many were. Raises DatabaseAway.

        Args:
            stop: whoever leaves does not wait for endpoints that do not answer: the first that fails is the last.
        """
        sent = 0
        while sent < most and (row := self._taken()) is not None:
            reason = self._send(row)
            self._noted(row, reason)
            sent += 1
            if reason and stop is not None and stop.is_set():
                break
        return sent

    def _taken(self) -> Any:
        """The message that waited longest, which nobody else sends meanwhile."""
        with self.database.write() as connection:
            now = self.database.now(connection)
            due = sql.select(WEBHOOKS.c.number).where(WEBHOOKS.c.due <= now)
            oldest = due.order_by(WEBHOOKS.c.due).limit(1).with_for_update(skip_locked=True)
            number = connection.execute(oldest).scalar_one_or_none()
            if number is None:
                return None
            held = {"due": now + SENDING_SECONDS, "attempts": WEBHOOKS.c.attempts + 1}
            this = WEBHOOKS.update().where(WEBHOOKS.c.number == number).values(held)
            return connection.execute(this.returning(WEBHOOKS)).one()

    def _send(self, row: Any) -> str:
        """Why it did not arrive; empty where it did, `gone` where nobody wants it."""
        signer = self.signers.get(row.endpoint)
        if signer is None:
            return "gone: no longer in the settings"
        body = json.dumps(
            {
                "object": "event",
                "id": row.event,
                "type": row.type,
                "created_at": row.created_at,
                "data": {"id": row.job},
            }
        )
        now = datetime.now(tz=UTC)
        headers = {
            "content-type": "application/json",
            "user-agent": "sora-serve",
            "webhook-id": row.event,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": signer.sign(row.event, now, body),
        }
        request = urllib.request.Request(row.endpoint, body.encode(), headers, method="POST")
        try:
            with self.open(request, timeout=TIMEOUT_SECONDS):
                return ""
        except urllib.error.HTTPError as error:
            error.close()
            return "gone" if error.code == GONE else f"HTTP {error.code}"
        except (OSError, ValueError) as error:
            return " ".join(str(error).split())[:200] or type(error).__name__

    def _noted(self, row: Any, reason: str) -> None:
        over = not reason or reason.startswith("gone") or row.attempts >= MAX_ATTEMPTS
        pause = min(FIRST_PAUSE_SECONDS * GROWTH ** (row.attempts - 1), LONGEST_PAUSE_SECONDS)
        if reason:
            what = "given up" if over else f"again in {pause:.0f} s"
            log.warning("%s of %s to %s: %s; %s", row.type, row.job, row.endpoint, reason, what)
        with self.database.write() as connection:
            due = None if over else self.database.now(connection) + pause
            this = WEBHOOKS.update().where(WEBHOOKS.c.number == row.number)
            connection.execute(this.values(due=due, reason=reason or None))


def _signer(endpoint: str, secret: str) -> Any:
    try:
        return importlib.import_module("standardwebhooks").Webhook(secret)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the secret of webhook {endpoint} is none ({error}); write whsec_ and 24 to 64 random bytes in base64"
        ) from None
