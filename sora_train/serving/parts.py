"""The parts that settings choose: the backend, the policy, the watermark and the signature."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sora_train.errors import UserError
from sora_train.serving.access.audit import Audit
from sora_train.serving.jobs.job import Job
from sora_train.serving.settings import Settings

if TYPE_CHECKING:
    from sora_train.serving.backends.base import Backend
    from sora_train.serving.safety.policy import Policy

NONE = "none"


def open_backend(settings: Settings) -> "Backend":
    """Raises UserError where the settings name none."""
    chosen = settings.backend
    if chosen.kind == "openai":
        from sora_train.serving.backends.openai import OpenAIBackend

        if not chosen.url:
            raise UserError("backend.kind=openai needs backend.url, such as http://gpu1:8000/v1")
        return OpenAIBackend(chosen)
    if not chosen.ckpt:
        raise UserError(
            "there is nothing to make videos with; add --ckpt RUN, or backend.url to the settings"
        )
    from sora_train.serving.backends.local import LocalBackend

    return LocalBackend(chosen.ckpt, adapters=chosen.adapters)


def open_policy(settings: Settings, audit: Audit) -> "Policy | None":
    """The safety policy; None where the settings say `none`. Raises UserError for its file or its endpoint."""
    chosen = settings.safety
    if chosen.policy == NONE:
        if chosen.moderation_url:
            raise UserError(
                "safety.policy=none and safety.moderation_url do not go together; leave one out"
            )
        return None
    from sora_train.serving.safety.policy import Policy
    from sora_train.serving.safety.policy_file import SHIPPED

    return Policy.read(
        Path(chosen.policy) if chosen.policy else SHIPPED,
        moderation_url=chosen.moderation_url,
        moderation_key_env=chosen.moderation_key_env,
        audit=audit,
    )


def open_watermark(settings: Settings) -> Callable[[Path, Path], None] | None:
    """What marks the first file into the second; None where the settings say `none`. Raises UserError for the key."""
    if settings.watermark_key == NONE:
        return None
    from sora_train.serving.provenance.watermark import Watermark

    # One reader for whoever marks and whoever looks: another would make another key of the same file.
    path = settings.watermark_key or settings.folder / "watermark.key"
    return Watermark.made(Path(path).expanduser()).mark


def open_sign(settings: Settings) -> Callable[[Job, Path, Path, Path | None], None] | None:
    """What signs the second file into the third; None where the settings name no certificate. Raises UserError."""
    chosen = settings.signing
    if not (chosen.certificate or chosen.key or chosen.callback or chosen.dev_cert):
        return None
    from sora_train.serving.provenance.signing import open_signer

    signer = open_signer(
        certificate=Path(chosen.certificate) if chosen.certificate else None,
        key=Path(chosen.key) if chosen.key else None,
        callback=chosen.callback,
        timestamps=chosen.timestamps,
        dev_folder=settings.folder / "dev_certs" / chosen.dev_cert if chosen.dev_cert else None,
    )

    def sign(job: Job, source: Path, target: Path, parent: Path | None) -> None:
        asked = job.asked
        signer.sign(
            source,
            target,
            title=f"{job.id}.mp4",
            model=asked.model,
            action=asked.op if parent else "create",
            parent=parent,
            parameters={
                "seconds": asked.seconds,
                # As text: C2PA would keep small numbers in a list as bytes.
                "size": "{}x{}".format(*asked.size),
                "operation": asked.sampling_op,
            },
        )

    return sign
