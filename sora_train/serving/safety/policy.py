"""The policy of a server: judges prompts, what is uploaded, and what came out."""

import hashlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from sora_train.serving.safety.decision import AuditLog, Decision, Entry, LoggedDecisions, digest_of
from sora_train.serving.safety.files import frames_of, picture_of
from sora_train.serving.safety.moderation import Moderation
from sora_train.serving.safety.pictures import Watch, check_pictures
from sora_train.serving.safety.policy_file import SHIPPED, Category, PolicyFile, read_policy
from sora_train.serving.safety.rules import Found, Rules

UPLOAD_FPS = 2.0
_FACES = "the upload shows a person's face, and this server takes none"
_NSFW = "the upload is not safe for work by this server's classifier"
_OUTPUT = "the video that was made is not safe for work by this server's classifier"
_AWAY = "the prompt could not be checked: this server's moderation does not answer; try again later"


class Policy:
    """Judges; every decision goes to the log of decisions. Safe to be used by several threads."""

    def __init__(
        self,
        rules: PolicyFile,
        path: Path,
        *,
        moderation: Moderation | None,
        audit: AuditLog | None,
    ):
        self._file, self._rules = rules, Rules(rules, path)
        self._moderation, self._audit = moderation, audit or LoggedDecisions()
        check_pictures(rules.uploads.face_model)

    @classmethod
    def read(
        cls,
        path: Path = SHIPPED,
        *,
        moderation_url: str = "",
        moderation_key_env: str = "",
        audit: AuditLog | None = None,
    ) -> "Policy":
        """The policy of a YAML file, with another moderation endpoint where one is given.

        Raises UserError for the file, the key's variable, or a missing package.
        """
        rules = read_policy(path)
        settings = rules.moderation
        if moderation_url:
            given = {"address": moderation_url, "key_env": moderation_key_env}
            settings = settings.model_copy(update=given)
        moderation = Moderation(settings) if settings.address else None
        return cls(rules, path, moderation=moderation, audit=audit)

    @classmethod
    def default(cls, *, audit: AuditLog | None = None) -> "Policy":
        """The policy that comes with the package."""
        return cls.read(audit=audit)

    def judge_prompt(self, *texts: str, subject: str = "") -> Decision:
        """All texts that one video is made of, the prompt first. `subject` is for the log: whose, or which job."""
        found, rewritten = self._rules.apply(texts)
        decision, action = self._of_rules(found, texts, rewritten)
        if decision.allowed and self._moderation is not None:
            decision, action = self._of_moderation(self._moderation, decision, action)
        text = "\n".join(texts) if self._file.keep_prompts else ""
        self._record("prompt", action, decision, subject, digest_of(*texts), text)
        return decision

    def judge_upload(self, path: Path, kind: str, *, subject: str = "") -> Decision:
        """A picture ("image") or clip ("video") that was sent. Raises BadFile where it is none or over a limit."""
        settings = self._file.uploads
        watch = Watch(settings.nsfw, settings.faces != "allow", settings.face_model)
        if kind == "image":
            watch.see(picture_of(path, settings.limits))
        else:
            with closing(frames_of(path, UPLOAD_FPS, settings.limits)) as pictures:
                for picture in pictures:
                    watch.see(picture)
        watch.end()
        rules = tuple(f"upload: {name}" for name in sorted(watch.found))
        decision = Decision(True, rules=rules)
        if "faces" in watch.found and settings.faces == "block":
            decision = Decision(False, category="faces", reason=_FACES, rules=rules)
        if "nsfw" in watch.found:
            decision = Decision(False, category="sexual", reason=_NSFW, rules=rules)
        action = "block" if not decision.allowed else "log" if rules else "allow"
        self._record("upload", action, decision, subject, _digest(path))
        return decision

    def judge_video(self, path: Path, *, subject: str = "") -> Decision:
        """A video that was made; one frame too many blocks all of it. Raises BadFile where it cannot be decoded."""
        settings, decision = self._file.outputs, Decision(True)
        watch = Watch(settings.nsfw)
        with closing(frames_of(path, settings.fps)) as pictures:
            for picture in pictures if settings.nsfw < 1 else ():
                watch.see(picture)
                if watch.found:
                    rule = f"video: nsfw {watch.worst:.2f} at frame {watch.seen} of those looked at"
                    decision = Decision(False, category="sexual", reason=_OUTPUT, rules=(rule,))
                    break
        action = "allow" if decision.allowed else "block"
        self._record("video", action, decision, subject, _digest(path))
        return decision

    def _of_rules(
        self, found: Sequence[Found], texts: Sequence[str], rewritten: Sequence[str]
    ) -> tuple[Decision, str]:
        rules = tuple(dict.fromkeys(f"{one.category}: {one.rule}" for one in found))
        for action in ("block", "rewrite", "log"):
            one = self._first(found, action)
            if one is None:
                continue
            name, category = one
            kept = texts if action == "block" else rewritten
            reason = {
                "block": f"the prompt asks for {category.says}, which this server does not make",
                "rewrite": f"the prompt names {category.says}; it was rewritten",
                "log": "",
            }[action]
            return _decision(action != "block", kept, name, reason, rules), action
        return _decision(True, texts, "", "", ()), "allow"

    def _first(self, found: Sequence[Found], action: str) -> tuple[str, Category] | None:
        """The first category with this action."""
        for one in found:
            category = self._file.categories[one.category]
            if category.action == action:
                return one.category, category
        return None

    def _of_moderation(
        self, moderation: Moderation, decision: Decision, action: str
    ) -> tuple[Decision, str]:
        verdict = moderation.ask(decision.prompts)
        if verdict.failure:
            rules = (*decision.rules, f"moderation: unreachable ({verdict.failure})")
            if moderation.blocks_when_unreachable:
                return _decision(False, decision.prompts, "moderation", _AWAY, rules), "block"
            kept = _decision(True, decision.prompts, decision.category, decision.reason, rules)
            return kept, "log" if action == "allow" else action
        if not verdict.categories:
            return decision, action
        rules = (*decision.rules, *(f"moderation: {name}" for name in verdict.categories))
        reason = (
            f"the prompt is refused by this server's moderation: {', '.join(verdict.categories)}"
        )
        return _decision(False, decision.prompts, "moderation", reason, rules), "block"

    def _record(
        self, stage: str, action: str, decision: Decision, subject: str, digest: str, text: str = ""
    ) -> None:
        entry = Entry(
            stage, action, decision.category, decision.reason, decision.rules, subject, digest, text
        )
        self._audit.record(entry)


def _decision(
    allowed: bool, texts: Sequence[str], category: str, reason: str, rules: tuple[str, ...]
) -> Decision:
    return Decision(allowed, texts[0] if texts else "", category, reason, rules, tuple(texts))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
