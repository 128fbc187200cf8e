"""One step, clip by clip: what was trained, with which draws, at what loss; as a table, a picture and JSON.

All of it follows from micro-batches and their terms, so it serves both: a live trainer that has them at
hand (`draw_step`, after a step that went wrong), and `sora replay`, which rebuilds any step of any run.
"""

import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from sora_train.base.contact_sheet import contact_sheet
from sora_train.base.files import write_atomically
from sora_train.data.manifest import Manifest
from sora_train.data.sample import Clip, ClipBatch
from sora_train.errors import Fault
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.objectives import LossTerm, Objective, SampleInfo
from sora_train.training.components import Components
from sora_train.training.run import RunContext

SHEET, FACTS = "contact_sheet.png", "replay.json"
MAX_ROWS = 48
"""Clips drawn on a sheet, those with the highest loss first; the JSON has all."""
MAX_LIVE_ROWS = 12
"""The same while a run waits for it."""
MAX_LABEL = 160
"""Characters of a caption on the sheet; the JSON has all."""


@dataclass(frozen=True)
class Sample:
    """A clip of a step. `rank` and `slot` are where it was trained, `row` and `epoch` what its draws are keyed by.

    `t` is its noise level (0 data, 1 noise), `given` tells the latent frames that its `kind` of
    conditioning gives, `prompt` is what the model was told ('' where the caption was dropped). `loss` is
    its own mean error, `share` its part of the step's loss: shares add up to the loss. What an
    objective or a run without a model does not tell is None; a clip with a `failure` was not trained.
    """

    rank: int
    slot: int
    row: int
    epoch: int
    key: str
    path: str
    bucket: str
    fps: float | None = None
    caption: str | None = None
    prompt: str | None = None
    kind: str | None = None
    given: list[int] | None = None
    t: float | None = None
    t_given: float | None = None
    loss: float | None = None
    share: float | None = None
    failure: str | None = None


def samples_of(
    objective: Objective,
    manifest: Manifest,
    batches: Sequence[ClipBatch],
    places: Sequence[tuple[int, int]],
    terms: Sequence[Mapping[str, LossTerm]] = (),
    totals: Mapping[str, float] | None = None,
) -> list[Sample]:
    """The clips of micro-batches, in their order, those that failed after the good ones of each.

    Args:
        places: (rank, slot) of each micro-batch.
        terms: of each micro-batch, as the objective gave them; empty: losses are not known.
        totals: each term's total weight over the step.
    """
    found: list[Sample] = []
    for number, (batch, (rank, slot)) in enumerate(zip(batches, places, strict=True)):
        bucket = batch.micro_batch.bucket.name
        infos = objective.describe(batch)
        losses = _losses(batch, infos, terms[number], totals or {}) if terms else []
        for i, clip in enumerate(batch.clips):
            known = _facts(manifest, clip.row) | (_draws(infos[i]) if infos else {})
            known |= losses[i] if losses else {}
            found.append(
                Sample(
                    rank, slot, clip.row, clip.epoch, bucket=bucket, fps=clip.fps, caption=clip.caption, **known
                )
            )  # fmt: skip
        epochs = dict(zip(batch.micro_batch.rows, batch.micro_batch.epochs, strict=True))
        found += [
            Sample(
                rank, slot, lost.row, epochs.get(lost.row, 0), bucket=bucket,
                failure=f"{lost.reason}: {lost.detail}", **_facts(manifest, lost.row),
            )
            for lost in batch.failures
        ]  # fmt: skip
    return found


def _facts(manifest: Manifest, row: int) -> dict[str, Any]:
    return {"key": str(manifest.key[row]), "path": manifest.path(row)}


def _draws(info: SampleInfo) -> dict[str, Any]:
    """The fields of a Sample that chance decided."""
    frames = info.condition_frames
    return {
        "prompt": info.prompt,
        "kind": info.kind,
        "given": None if frames is None else list(frames),
        "t": info.t,
        "t_given": info.t_condition,
    }


def _losses(
    batch: ClipBatch,
    infos: Sequence[SampleInfo],
    terms: Mapping[str, LossTerm],
    totals: Mapping[str, float],
) -> list[dict[str, float]]:
    """Loss and share of each clip; [] where the terms do not tell of clips, or there is none."""
    parts = {name: term.per_sample for name, term in terms.items()}
    if not batch.clips or any(part is None for part in parts.values()):
        return []
    weights = [max(1.0, info.weight) for info in infos] or [1.0] * len(batch.clips)
    values = {name: part.double().tolist() for name, part in parts.items() if part is not None}
    return [
        {
            "loss": sum(part[i] for part in values.values()) / weights[i],
            "share": sum(
                part[i] / max(totals.get(name, 1.0), 1.0) for name, part in values.items()
            ),
        }
        for i in range(len(batch.clips))
    ]


@torch.no_grad()
def frames_of(clip: Clip, vae: VideoVAE) -> np.ndarray:
    """A clip as uint8 (T, H, W, 3): its own pixels, or what the VAE makes of its stored latents."""
    if clip.pixels is not None:
        return clip.pixels
    assert clip.latents is not None, "a clip has pixels or latents"
    device = next(vae.parameters()).device
    pixels = vae.decode(torch.from_numpy(clip.latents)[None].to(device))[0]
    scaled = ((pixels.float() + 1) * 127.5).round().clamp(0, 255)
    return scaled.permute(1, 2, 3, 0).to(torch.uint8).cpu().numpy()


def write_replay(
    out: Path,
    about: Mapping[str, Any],
    title: str,
    samples: Sequence[Sample],
    clips: Mapping[tuple[int, int], Clip],
    vae: VideoVAE,
    names: tuple[str, str] = (SHEET, FACTS),
    max_rows: int = MAX_ROWS,
) -> list[Path]:
    """Write the sheet and the facts, `about` the step and then every sample, into `out`.

    Args:
        clips: by (row, epoch).

    Raises:
        Fault: the files cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        written = [out / names[1]]
        facts = {**plain(about), "samples": [plain(asdict(sample)) for sample in samples]}
        write_atomically(written[0], json.dumps(facts, indent=1))
        shown = [sample for sample in samples if (sample.row, sample.epoch) in clips]
        shown.sort(key=_height, reverse=True)
        shown = shown[:max_rows]
        if shown:
            written.append(
                contact_sheet(
                    [frames_of(clips[sample.row, sample.epoch], vae) for sample in shown],
                    [_label(sample) for sample in shown],
                    out / names[0],
                    notes=[_notes(sample) for sample in shown],
                    title=title if len(shown) == len(samples) else f"{title}; {len(shown)} of {len(samples)} clips",
                )
            )  # fmt: skip
    except OSError as error:
        raise Fault(
            f"the replay cannot be written to {out}: {error.strerror}; give another folder with --out"
        ) from error
    return written


def _height(sample: Sample) -> float:
    """What clips are sorted by: their loss, one that is not finite above all."""
    loss = sample.loss or 0.0
    return loss if math.isfinite(loss) else math.inf


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts as JSON has them: it lacks numbers that are not finite, so these become words."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in facts.items()
    }


def _told(sample: Sample, longest: int) -> str:
    """What the model was told, cut to so many characters."""
    if sample.prompt is None:
        text = sample.caption or "(no caption)"
    else:
        text = sample.prompt or f"(no caption, dropped: {sample.caption})"
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _label(sample: Sample) -> str:
    numbers = {"loss": sample.loss, "t": sample.t}
    known = [f"{name} {value:.4g}" for name, value in numbers.items() if value is not None]
    return "\n".join([*([", ".join(known)] if known else []), _told(sample, MAX_LABEL)])


def _notes(sample: Sample) -> str:
    lines = []
    if sample.given is not None:
        lines.append(f"{sample.kind} {frames_given(sample.given)}")
    lines.append(f"{sample.key}, epoch {sample.epoch}")
    size = sample.bucket + (f", {sample.fps:g} fps" if sample.fps else "")
    where = "/".join(Path(sample.path).parts[-2:])
    return "\n".join([*lines, f"{size}, rank {sample.rank} slot {sample.slot}", where])


def frames_given(given: Sequence[int]) -> str:
    """Latent frames as boxes, filled where they are given; counted where they are many."""
    if len(given) > 16:
        return f"{sum(given)} of {len(given)} given"
    return "".join("■" if frame else "□" for frame in given)


def table_of(samples: Sequence[Sample]) -> str:
    """The samples as a table, in their order."""
    table = Table(show_edge=False, pad_edge=False)
    for name in ("rank", "slot", "key", "epoch", "bucket", "t", "kind", "loss", "share", "prompt"):
        table.add_column(name, justify="right" if name in ("t", "loss", "share") else "left")
    total = sum(sample.share or 0.0 for sample in samples)
    for sample in samples:
        told = sample.failure or _told(sample, 60)
        table.add_row(
            str(sample.rank),
            str(sample.slot),
            sample.key,
            str(sample.epoch),
            sample.bucket,
            "" if sample.t is None else f"{sample.t:.3f}",
            "" if sample.given is None else f"{sample.kind} {frames_given(sample.given)}",
            "" if sample.loss is None else f"{sample.loss:.5f}",
            "" if sample.share is None or not total else f"{sample.share / total:.1%}",
            told,
            style="dim" if sample.failure else None,
        )
    text = io.StringIO()
    Console(file=text, width=200).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def draw_step(
    run: RunContext,
    parts: Components,
    samples: Sequence[Sample],
    batches: Sequence[ClipBatch],
    step: int,
    data_step: int,
    why: str = "",
) -> list[Path]:
    """Draw this rank's part of step `step` (counted from 1) into RUN/spikes/step-N, from what is at hand.

    Nothing is decoded again and no rank waits for another: every rank that calls it writes files of its
    own, of those that share their clips the first one. A picture that cannot be drawn is told of and does
    not stop the run. After a roll-back the same step trains other data, so its folder then names the step
    of the tape too.

    Args:
        samples: of the micro-batches, as `samples_of` tells them.
        data_step: the step of the tape that was trained.
        why: what went wrong, for the title.
    """
    rank, size = run.world.rank, run.world.size
    if run.world.cp_rank:
        return []
    moved = "" if data_step + 1 == step else f"-tape-{data_step + 1:06d}"
    out = run.folder.path / "spikes" / f"step-{step:06d}{moved}"
    try:
        clips = {(clip.row, clip.epoch): clip for batch in batches for clip in batch.clips}
        about = {"step": step, "rank": rank, "ranks": size, "why": why}
        title = f"step {step}, rank {rank} of {size}" + (f": {why}" if why else "")
        names = f"rank-{rank}.png", f"rank-{rank}.json"
        return write_replay(out, about, title, samples, clips, parts.vae, names, MAX_LIVE_ROWS)
    except Exception as error:
        print(f"the clips of step {step} could not be drawn: {error}", file=sys.stderr, flush=True)
        return []
