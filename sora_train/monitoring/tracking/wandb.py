"""Sends a run to W&B: own step, the run's own id, offline into the run folder where there is no key."""

import os
from pathlib import Path
from typing import Any

from sora_train.base.files import write_atomically
from sora_train.errors import UserError
from sora_train.monitoring.tracking.process import notice_file, run_id

INIT_SECONDS = 30.0
ALERT_SECONDS = 1
"""Alerts of one title within this time are dropped by W&B; 0 would mean its default of a minute."""


class WandbSink:
    """A W&B run. W&B's process confirms nothing before it has finished, so nothing is safe before `close`.

    mode: `auto` is $WANDB_MODE if set, else online with a W&B key and offline without.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        project: str,
        mode: str,
        new_run: bool = False,
        may_go_offline: bool = False,
    ):
        """With `may_go_offline`, where W&B refuses the key or its server does not answer, the reason goes to the
        run's notice file and the run is kept offline. Raises UserError without it."""
        wandb = self._wandb = _import_wandb()
        identity = run_id(run_dir, new=new_run)
        try:
            mode, self._run = _start(wandb, mode, run_dir, project, identity)
        except wandb.Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            if not may_go_offline:
                raise UserError(
                    f"W&B cannot be used: {reason}; check the key (`wandb login --relogin`, $WANDB_API_KEY) and the "
                    "address ($WANDB_BASE_URL), or use --mode offline"
                ) from error
            write_atomically(
                notice_file(run_dir, "wandb"),
                f"W&B cannot be used: {reason}; the run goes on and is kept offline in {run_dir / 'wandb'}: check the "
                "key (`wandb login --relogin`, $WANDB_API_KEY) and the address ($WANDB_BASE_URL)",
            )
            mode, self._run = _start(wandb, "offline", run_dir, project, identity)
        self.name = f"wandb-{mode}-{identity}"
        # Rows may come late and samples after them, so the step is a number of ours, not W&B's count.
        self._run.define_metric("step", summary="max")
        self._run.define_metric("*", step_metric="step")

    def confirmed_step(self) -> int:
        """What W&B's server holds of a run that goes on online; rows reach it in order."""
        step = self._run.summary.get("step")
        if isinstance(step, dict):
            step = step.get("max")
        return -1 if step is None else int(step)

    def config(self, values: dict[str, Any]) -> None:
        self._run.config.update(values, allow_val_change=True)

    def row(self, step: int, wall_time: float, values: dict[str, float]) -> None:
        self._run.log({"step": step, "time": wall_time, **values})

    def samples(self, step: int, clips: list[tuple[Path, str]], sheet: Path | None) -> None:
        media: dict[str, Any] = {
            f"samples/{number:03d}": self._wandb.Video(str(clip), caption=prompt, format="mp4")
            for number, (clip, prompt) in enumerate(clips)
        }
        if sheet is not None:
            media["samples/contact_sheet"] = self._wandb.Image(str(sheet))
        self._run.log({"step": step, **media})

    def alert(self, step: int, title: str, text: str) -> None:
        self._run.alert(title, f"step {step}: {text}", level="WARN", wait_duration=ALERT_SECONDS)

    def flush(self) -> bool:
        return False

    def close(self) -> None:
        self._run.finish()


def _start(wandb: Any, mode: str, run_dir: Path, project: str, identity: str) -> tuple[str, Any]:
    """The mode that `mode` comes to, and the run. Raises wandb.Error where W&B refuses or does not answer."""
    mode = _mode(wandb, mode)
    if mode == "online":
        # Asks the server about the key, within seconds; `init` would try again for minutes.
        wandb.login(prompt=False, verify=True)
    settings = wandb.Settings(
        console="off", silent=True, disable_git=True, init_timeout=INIT_SECONDS
    )
    run = wandb.init(
        project=project,
        name=run_dir.name,
        id=identity,
        resume="allow",
        mode=mode,
        dir=str(run_dir),
        settings=settings,
    )
    return mode, run


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "tracker=wandb needs the package wandb, which is not installed: "
            "run `pip install sora_train[wandb]` or set tracker=none."
        ) from error
    return wandb


def _mode(wandb: Any, mode: str) -> str:
    if mode != "auto":
        return mode
    return os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
