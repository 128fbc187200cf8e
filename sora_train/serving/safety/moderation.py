"""An endpoint with OpenAI's /v1/moderations, asked about prompts that the rules let pass."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sora_train.base.chat import SHOWN, Denied, Failed, answered, key_in
from sora_train.base.text import printable
from sora_train.serving.safety.policy_file import ModerationSettings

log = logging.getLogger("sora_train.serving.safety")


@dataclass(frozen=True)
class Verdict:
    """What the endpoint says of some texts."""

    categories: tuple[str, ...]
    """Those that it, or a threshold of the policy, finds; none: nothing is wrong."""
    failure: str = ""
    """Why it said nothing."""


class Moderation:
    """The endpoint of a policy. Raises UserError where its key's variable holds none."""

    def __init__(self, settings: ModerationSettings):
        self._settings = settings
        self._key = key_in(settings.key_env, f"moderation.key_env={settings.key_env}")

    def ask(self, texts: Sequence[str]) -> Verdict:
        """Never raises for what the endpoint does: it is down, slow, wrong; `failure` says so, the log too."""
        body = {"model": self._settings.model, "input": [text for text in texts if text.strip()]}
        if not body["input"]:
            return Verdict(())
        failure = ""
        for _ in range(self._settings.tries):
            try:
                data = answered(self._url, body, self._key, self._settings.seconds)
                return Verdict(self._found(data, len(body["input"])))
            except Failed as error:
                failure = str(error)
                if not error.again:
                    break
            except Denied as error:
                failure = f"the endpoint answers {error}"
                break
        policy = self._settings.when_unreachable
        log.error("moderation by %s failed: %s; the policy says %s", self._url, failure, policy)
        return Verdict((), failure)

    @property
    def blocks_when_unreachable(self) -> bool:
        return self._settings.when_unreachable == "block"

    @property
    def _url(self) -> str:
        return f"{self._settings.address.rstrip('/')}/moderations"

    def _found(self, data: bytes, count: int) -> tuple[str, ...]:
        """The categories of an answer. Raises Failed where it is none, or not about all texts."""
        try:
            results = json.loads(data)["results"]
            if not isinstance(results, list) or len(results) != count:
                raise ValueError
            found = [name for result in results for name in self._of(result)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            shown = printable(data.decode(errors="replace"))
            raise Failed(f"the endpoint answers no moderation: {shown!r:.{SHOWN}}") from None
        return tuple(dict.fromkeys(found))

    def _of(self, result: Mapping[str, Any]) -> list[str]:
        flagged = result["flagged"]
        if not isinstance(flagged, bool):
            raise ValueError
        found = [
            name for name, is_found in result.get("categories", {}).items() if is_found is True
        ]
        scores = result.get("category_scores", {})
        strict = self._settings.thresholds.items()
        found += [name for name, least in strict if float(scores.get(name, 0)) >= least]
        return found or (["flagged"] if flagged else [])
