"""Who a request is from: the owner of its key, or the machine itself while there is no key."""

import urllib.parse
from dataclasses import dataclass

from starlette.requests import Request

from sora_train.serving.access.keys import LOCAL, Key
from sora_train.serving.errors import Forbidden
from sora_train.serving.service import Service

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Caller:
    """Who asks, in which request."""

    key: Key | None
    request_id: str = ""

    @property
    def owner(self) -> str:
        return self.key.id if self.key else LOCAL


class Callers:
    """Dependencies of the routes."""

    def __init__(self, service: Service):
        self.service = service

    def looking(self, request: Request) -> Caller:
        """The caller of a request that makes nothing. Raises Unauthorized, Forbidden."""
        header = request.headers.get("authorization")
        may_be_local = self.service.settings.is_loopback
        key = self.service.keys.owner_of(header, may_be_local=may_be_local)
        if key is None:
            _require_own_page(request)
        return Caller(key, request.state.request_id)

    def making(self, request: Request) -> Caller:
        """The caller of a request that makes something. Raises TooManyRequests too."""
        caller = self.looking(request)
        self.service.limits.count_request(caller.key)
        return caller


def _require_own_page(request: Request) -> None:
    """Without keys any page in a browser on this machine could ask for videos: only our own may.

    Raises Forbidden for a name of the host that is not this machine's (DNS rebinding), and for other pages' requests.
    """
    host = urllib.parse.urlsplit(f"//{request.headers.get('host', '')}").hostname
    origin = request.headers.get("origin")
    own = (f"http://{request.headers.get('host', '')}", None)
    if host not in LOOPBACK or origin not in own:
        raise Forbidden(
            "Without keys this server answers its own machine at 127.0.0.1 alone; add one: sora serve keys add NAME."
        )
