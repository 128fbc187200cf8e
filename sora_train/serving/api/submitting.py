"""From what is wanted to a job in the database: safety, what the backend says, the files, then all at once the row."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import sqlalchemy as sql

from sora_train.errors import UserError
from sora_train.serving.access.callers import Caller
from sora_train.serving.api.asking import Wanted
from sora_train.serving.api.uploads import Arrived
from sora_train.serving.backends.base import BadRequest as BackendRefuses
from sora_train.serving.errors import BadRequest
from sora_train.serving.jobs.job import Character, DatabaseAway, Job, Upload, new_id
from sora_train.serving.service import Service

if TYPE_CHECKING:
    from sora_train.serving.safety.decision import Decision

BLOCKED = "The request was blocked by this server's safety policy"


class Submitting:
    """Takes jobs in. Nothing is kept of a request that is refused but a line in the audit log."""

    def __init__(self, service: Service):
        self.service = service

    def video(self, caller: Caller, wanted: Wanted, idempotency_key: str | None) -> Job:
        """The job, or the one that the idempotency key stands for.

        Raises ApiError, and what the store raises.
        """
        wanted = wanted.reworded(self._judged(caller, wanted.texts, wanted.arrived))
        job_id = new_id()
        uploads = {name: _upload(job_id, name, file) for name, file in wanted.arrived.items()}
        asked = replace(
            wanted.asked,
            uploads=tuple(uploads.values()),
            storyboard=_with_names(wanted.asked.storyboard, uploads),
        )
        try:
            self.service.backend.check(asked)
        except BackendRefuses as error:
            raise BadRequest(error.param, f"{str(error).rstrip('.')}.") from None

        def room(connection: sql.Connection) -> None:
            self.service.limits.require_room(connection, caller.key, asked)
            self._note(caller, "video.created", job_id, connection, op=asked.op, model=asked.model)

        def create() -> Job:
            store = self.service.store
            given: dict[str, Any] = {"job_id": job_id, "idempotency_key": idempotency_key}
            return store.create(caller.owner, asked, **given, room=room)[0]

        with self._kept(list(uploads.values()), list(wanted.arrived.values())) as keep:
            try:
                job = create()
            except DatabaseAway:
                job = self._created_after_all(create, keep)
            if job.id == job_id:
                keep()
        return job

    def _created_after_all(self, create: Callable[[], Job], keep: Callable[[], None]) -> Job:
        """The job of a `create` whose answer was lost: nobody knows whether it is there, and a client that is told 503
        would ask for a second one. Under the same id it is not made again. Raises DatabaseAway."""
        try:
            return create()
        except DatabaseAway:
            keep()  # a job that is there after all needs its files
            raise

    def character(self, caller: Caller, name: str, arrived: Arrived) -> Character:
        """A character of a clip. Raises ApiError."""
        self._judged(caller, [name], {"video": arrived})
        upload = _upload(new_id("char"), "video", arrived)
        with self._kept([upload], [arrived]) as keep:
            made = self.service.store.add_character(
                caller.owner,
                name,
                upload,
                room=lambda at: self.service.limits.require_room_for_character(at, caller.owner),
            )
            keep()
        self._note(caller, "character.created", made.id)
        return made

    def delete_character(self, caller: Caller, character_id: str) -> bool:
        """Whether there was such a character of the caller's; its clip is gone too."""
        upload = self.service.store.delete_character(character_id, caller.owner)
        if upload is not None:
            self.service.files.remove(upload.name)
            self._note(caller, "character.deleted", character_id)
        return upload is not None

    def delete(self, caller: Caller, video_id: str) -> bool:
        """Whether there was such a video of the caller's."""
        done = self.service.store.delete(video_id, caller.owner)
        if done:
            self._note(caller, "video.deleted", video_id)
        return done

    @contextlib.contextmanager
    def _kept(self, uploads: list[Upload], arrived: list[Arrived]) -> Any:
        """The files in the store, before a worker may look for them; gone again unless the block keeps them."""
        kept: list[bool] = []
        put: list[Upload] = []
        try:
            for upload, file in zip(uploads, arrived, strict=True):
                put.append(upload)
                self.service.files.put(upload.name, file.path)
            yield lambda: kept.append(True)
        finally:
            if not kept:
                for upload in put:
                    self.service.files.remove(upload.name)

    def _judged(
        self, caller: Caller, texts: list[str], files: dict[str, Arrived]
    ) -> dict[str, str]:
        """The texts that the policy rewrites, by what they were. Raises BadRequest for what it refuses."""
        policy, subject = self.service.policy, caller.request_id
        if policy is None:
            return {}
        said = policy.judge_prompt(*texts, subject=subject)
        self._require(caller, said, None)
        for name, file in files.items():
            try:
                decision = policy.judge_upload(file.path, file.kind, subject=subject)
            except UserError as error:
                raise BadRequest(name, f"{str(error).rstrip('.')}.", "invalid_file") from None
            self._require(caller, decision, name)
        return dict(zip(texts, said.prompts or texts, strict=True))

    def _require(self, caller: Caller, decision: "Decision", param: str | None) -> None:
        if not decision.allowed:
            rules = list(decision.rules)
            self._note(caller, "request.blocked", "", category=decision.category, rules=rules)
            raise BadRequest(param, f"{BLOCKED}: {decision.reason}.", "moderation_blocked")

    def _note(
        self,
        caller: Caller,
        event: str,
        subject: str,
        connection: sql.Connection | None = None,
        **detail: Any,
    ) -> None:
        who = {"owner": caller.owner, "request": caller.request_id}
        self.service.audit.note(event, subject=subject, connection=connection, **who, **detail)


def _upload(job_id: str, name: str, file: Arrived) -> Upload:
    return Upload(f"inputs/{job_id}/{name}.{file.ending}", file.kind, file.digest)


def _with_names(
    cues: list[dict[str, Any]] | None, uploads: dict[str, Upload]
) -> list[dict[str, Any]] | None:
    """The cues with their files by their names in the store."""
    if cues is None:
        return None
    return [
        {
            key: uploads[value].name if key in ("image", "video") and value in uploads else value
            for key, value in cue.items()
        }
        for cue in cues
    ]
