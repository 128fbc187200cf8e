"""What a file says of where it comes from, and whether that can be believed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_train.serving.provenance.detection import Detection
from sora_train.serving.provenance.manifests import Reading, read_manifests
from sora_train.serving.provenance.signing import AI
from sora_train.serving.provenance.watermark import Watermark

_UNTRUSTED = "signingCredential.untrusted"


@dataclass(frozen=True)
class Action:
    """One thing that was done to a video, as the manifest has it."""

    name: str
    software: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """The newest manifest of a file, its parents', and how its validation ended."""

    file: str
    state: str
    """Trusted: the signature leads to a root of the anchors. Valid: nothing was changed since it was signed, by
    whomever. Invalid: something was. None: there is no manifest."""
    failures: tuple[str, ...]
    trust_asked: bool
    """Whether there were anchors to lead to."""
    title: str = ""
    issuer: str = ""
    signer: str = ""
    generator: str = ""
    ai: bool = False
    actions: tuple[Action, ...] = ()
    parents: tuple[str, ...] = ()
    """Titles, the parent first and its own parent behind it; with a note where one was no longer what had been signed
    when it was taken."""
    watermark: Detection | None = None

    @property
    def ok(self) -> bool:
        return self.state == "Trusted" or (self.state == "Valid" and not self.trust_asked)


def verdict(path: Path, anchors: str | None = None, watermark: Watermark | None = None) -> Verdict:
    """Read the manifests of a file, and look for the watermark if one is given.

    `anchors` are trusted roots in PEM.

    Raises:
        OSError: the file cannot be read.
        UserError: it cannot be decoded, where a watermark is looked for.
    """
    reading = read_manifests(path, anchors)
    manifest = reading.active
    failures = reading.failures
    if anchors is None:
        failures = tuple(failure for failure in failures if failure != _UNTRUSTED)
    actions = list(_actions(manifest))
    signature = manifest.get("signature_info", {})
    return Verdict(
        file=str(path),
        state=reading.state,
        failures=failures,
        trust_asked=anchors is not None,
        title=manifest.get("title", ""),
        issuer=signature.get("issuer", ""),
        signer=signature.get("common_name", ""),
        generator=" ".join(
            f"{each.get('name', '')} {each.get('version', '')}".strip()
            for each in manifest.get("claim_generator_info", ())[:1]
        ),
        ai=any(each.get("digitalSourceType") == AI for each in actions),
        actions=tuple(_action(each) for each in actions),
        parents=tuple(_parents(reading, manifest)),
        watermark=watermark.detect(path) if watermark is not None else None,
    )


def _actions(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for assertion in manifest.get("assertions", ()):
        if assertion["label"].startswith("c2pa.actions"):
            yield from assertion["data"].get("actions", ())


def _action(action: dict[str, Any]) -> Action:
    agent = action.get("softwareAgent", "")
    name = agent.get("name", "") if isinstance(agent, dict) else str(agent)
    parameters = {
        key: value
        for key, value in action.get("parameters", {}).items()
        if key not in ("ingredients", "ingredientIds")
    }
    return Action(action["action"], name, parameters)


def _parents(reading: Reading, manifest: dict[str, Any]) -> Iterator[str]:
    """Along the chain of parents; one that had no manifest ends it."""
    seen: set[str] = set()
    while True:
        ingredients = manifest.get("ingredients", ())
        parent = next(
            (each for each in ingredients if each.get("relationship") == "parentOf"), None
        )
        if parent is None:
            return
        yield parent.get("title", "") + (" (damaged)" if _was_invalid(parent) else "")
        label = parent.get("active_manifest")
        if label is None or label in seen:
            return
        seen.add(label)
        manifest = reading.manifest(label)


def _was_invalid(ingredient: dict[str, Any]) -> bool:
    failures = ingredient.get("validation_results", {}).get("activeManifest", {}).get("failure", ())
    return any(failure["code"] != _UNTRUSTED for failure in failures)
