"""The process of `sora serve worker`: a worker with all that happens to a video before it is delivered."""

import logging
import os
import signal
import sys
import threading

from sora_train.errors import UserError
from sora_train.serving.jobs.delivery import Steps
from sora_train.serving.jobs.webhooks import Webhooks
from sora_train.serving.jobs.worker import Pace, Worker
from sora_train.serving.parts import open_backend, open_policy, open_sign, open_watermark
from sora_train.serving.service import Service
from sora_train.serving.settings import Settings, WebhookSettings

BEHIND = 5
"""How much less urgent workers are than the gateway that started them: it answers while they use every core."""


def run_worker(settings: Settings, *, with_parent: bool = False) -> None:
    """Work until the process is told to stop, or its parent is gone; a job at hand goes back into the queue.

    Raises UserError for what cannot start.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    with Service.open(settings, open_backend(settings)) as service:
        worker = open_worker(service)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: worker.stop.set())
        if with_parent:
            os.nice(BEHIND)
            leave_with_parent()
        worker.run()


def open_worker(service: Service) -> Worker:
    """The worker of a service. Raises UserError for a policy, a certificate or a key that cannot be used."""
    settings = service.settings
    policy = open_policy(settings, service.audit)
    mark = open_watermark(settings)
    steps = Steps(
        judge=(lambda job, path: policy.judge_video(path, subject=job.id)) if policy else None,
        mark=mark,
        sign=open_sign(settings),
        bill=service.prices.usage,
    )
    secrets = {hook.url: _secret(hook) for hook in settings.webhooks}
    webhooks = Webhooks(service.store.database, secrets) if secrets else None
    pace = Pace(keep=settings.keep_hours * 3600)
    # Whole: messages of jobs leave it out by its name.
    work = settings.folder.absolute() / "work"
    return Worker(
        service.store,
        service.files,
        service.backend,
        work,
        steps=steps,
        webhooks=webhooks,
        pace=pace,
    )


def _secret(hook: WebhookSettings) -> str:
    """Raises UserError where a webhook would be sent unsigned."""
    secret = hook.secret or os.environ.get(hook.secret_env, "")
    if not secret:
        where = f"variable {hook.secret_env}" if hook.secret_env else "setting `secret`"
        raise UserError(
            f"the webhook {hook.url} has no secret: its {where} is empty; give it whsec_..."
        )
    return secret


def leave_with_parent() -> None:
    """End this process as SIGTERM does when the one that started it, which holds the end of its input, is gone."""

    def watch() -> None:
        # Not by the buffer, whose lock this thread would hold while the interpreter ends.
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
