"""The clips of one step as a contact sheet and as a table."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from sora_train.base.console import plain_console
from sora_train.base.contact_sheet import contact_sheet
from sora_train.data.sample import Clip, ClipBatch
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.models.vae.pixels import to_uint8
from sora_train.training.outputs.step_samples import StepSample

MAX_LABEL = 160
"""Characters of a caption on the sheet; the JSON beside it has all."""


def draw_sheet(
    path: Path,
    title: str,
    samples: Sequence[StepSample],
    batches: Sequence[ClipBatch],
    vae: VideoVAE,
    max_rows: int,
) -> Path | None:
    """Draw the clips with the highest losses, at most `max_rows` of them; None where there is no clip to draw.

    Args:
        batches: the micro-batches with the clips of `samples`.
    """
    clips: Mapping[tuple[int, int], Clip] = {
        (clip.row, clip.epoch): clip for batch in batches for clip in batch.clips
    }
    rows = [sample for sample in samples if (sample.row, sample.epoch) in clips]
    rows = sorted(rows, key=_height, reverse=True)[:max_rows]
    if not rows:
        return None
    return contact_sheet(
        [frames_of(clips[sample.row, sample.epoch], vae) for sample in rows],
        [_label(sample) for sample in rows],
        path,
        notes=[_notes(sample) for sample in rows],
        title=title
        if len(rows) == len(samples)
        else f"{title}; {len(rows)} of {len(samples)} clips",
    )


@torch.no_grad()
def frames_of(clip: Clip, vae: VideoVAE) -> np.ndarray:
    """A clip as uint8 (T, H, W, 3): its own pixels, or what the VAE decodes its stored latents to."""
    if clip.pixels is not None:
        return clip.pixels
    assert clip.latents is not None, "a clip has pixels or latents"
    device = next(vae.parameters()).device
    return to_uint8(vae.decode(torch.from_numpy(clip.latents)[None].to(device))[0])


def _height(sample: StepSample) -> float:
    """What clips are sorted by: their loss, one that is not finite above all."""
    loss = sample.loss or 0.0
    return loss if math.isfinite(loss) else math.inf


def _prompt(sample: StepSample, longest: int) -> str:
    """What the model was told, cut to so many characters."""
    if sample.prompt is None:
        text = sample.caption or "(no caption)"
    else:
        text = sample.prompt or f"(no caption, dropped: {sample.caption})"
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _label(sample: StepSample) -> str:
    numbers = {"loss": sample.loss, "t": sample.t}
    known = [f"{name} {value:.4g}" for name, value in numbers.items() if value is not None]
    return "\n".join([*([", ".join(known)] if known else []), _prompt(sample, MAX_LABEL)])


def _notes(sample: StepSample) -> str:
    lines = [_conditioning(sample)] if sample.condition_frames is not None else []
    lines.append(f"{sample.key}, epoch {sample.epoch}")
    size = sample.bucket + (f", {sample.fps:g} fps" if sample.fps else "")
    where = "/".join(Path(sample.path).parts[-2:])
    return "\n".join([*lines, f"{size}, rank {sample.rank} slot {sample.slot}", where])


def _conditioning(sample: StepSample) -> str:
    """The kind and its latent frames as boxes, filled where they are conditions; counted where they are many."""
    frames = sample.condition_frames
    if frames is None:
        return ""
    if len(frames) > 16:
        return f"{sample.kind} {sum(frames)} of {len(frames)} given"
    return f"{sample.kind} " + "".join("■" if frame else "□" for frame in frames)


def table_of(samples: Sequence[StepSample]) -> str:
    """The samples as a table, in their order."""
    table = Table(show_edge=False, pad_edge=False)
    for name in ("rank", "slot", "key", "epoch", "bucket", "t", "kind", "loss", "share", "prompt"):
        table.add_column(name, justify="right" if name in ("t", "loss", "share") else "left")
    total = sum(sample.share or 0.0 for sample in samples)
    for sample in samples:
        table.add_row(
            str(sample.rank),
            str(sample.slot),
            sample.key,
            str(sample.epoch),
            sample.bucket,
            "" if sample.t is None else f"{sample.t:.3f}",
            _conditioning(sample),
            "" if sample.loss is None else f"{sample.loss:.5f}",
            "" if sample.share is None or not total else f"{sample.share / total:.1%}",
            sample.failure or _prompt(sample, 60),
            style="dim" if sample.failure else None,
        )
    text = io.StringIO()
    plain_console(file=text, width=200).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
