"""The page, the picture and the table that `sora data report` writes: what becomes of each clip of a source."""

import base64
import csv
import io
import os
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sora_train.base.contact_sheet import contact_sheet, filmstrip
from sora_train.config import Config
from sora_train.data.captions.choice import captions_by_name, without_weighted
from sora_train.data.captions.texts import MAIN
from sora_train.data.decode.probe import traits_told
from sora_train.data.loader import backend_of
from sora_train.data.manifest import Manifest
from sora_train.models.text.lengths import CaptionLengths
from sora_train.monitoring.report.charts import histogram
from sora_train.monitoring.report.page import compact, render
from sora_train.tools.data.report_plan import FRAMES_SHOWN, DataPlan, Thumbnail, read_thumbnails

NAME = "data_report"
CLIPS_LISTED = 200
EXAMPLES = 5
CAPTION_SHOWN = 300
_FROM_THE_MANIFEST = ("caption", "captions", "scores", "traits")
MEANING = {
    "too_short": "fewer frames, at the sampling rate, than the shortest bucket takes (buckets.classes)",
    "too_small": "would have to be enlarged by more than buckets.max_upscale",
    "aspect_ratio": "more than buckets.max_crop of the frame would be cut off: add a ratio to buckets.classes",
    "no_caption": "no caption was found (data.captions, data.allow_empty_captions)",
    "bad_caption": "the caption is there and is no text, or its row is broken (docs/data.md, Text)",
    "bad_name": "the name of the file is no UTF-8",
    "bad_row": "a row of a table that names no clip",
    "unreadable": "cannot be decoded",
    "too_few_frames": "holds fewer frames than the index says",
    "decode_timeout": "takes longer to decode than data.decode_timeout",
    "decoder_crashed": "ends the decode process",
    "hdr": "is HDR, which data.hdr=drop leaves out",
}


def write_data_report(cfg: Config, out: Path) -> tuple[DataPlan, list[Path]]:
    """Write data_report.html, .csv and .png into `out`; returns the plan and the paths.

    The page needs no network. Without a clip that can be shown there is no picture. Raises what
    `DataPlan.open` does.
    """
    plan = DataPlan.open(cfg)
    thumbnails = read_thumbnails(plan)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{NAME}.html", out / f"{NAME}.csv"]
    _replace(paths[0], page(plan, thumbnails))
    _replace(paths[1], clip_table(plan))
    shown = [one for one in thumbnails if one.frames is not None]
    if shown:
        captions = [_cut(str(plan.manifest.caption[one.row]), 150) for one in shown]
        notes = [plan.fate(one.row) for one in shown]
        clips = [one.frames for one in shown if one.frames is not None]
        paths.append(contact_sheet(clips, captions, out / f"{NAME}.png", FRAMES_SHOWN, notes))
    return plan, paths


def account(plan: DataPlan) -> str:
    """`used + dropped(reason) = total` and the clips of each bucket that has any, for the terminal."""
    dropped = plan.assignment.dropped()
    total, lost = len(plan.manifest), sum(dropped.values())
    several = [source.name for source in plan.cfg.data.sources]
    where = ", ".join(several) or plan.manifest.root
    lines = [f"{where}: {total} clips = {total - lost} used + {lost} dropped"]
    lines += [f"  {number} dropped: {reason}" for reason, number in sorted(dropped.items())]
    lines += [
        f"  {number} in bucket {spec.bucket.name}"
        for spec, number in zip(plan.table, plan.clips_per_bucket, strict=True)
        if number
    ]
    data = plan.cfg.data
    told = traits_told(plan.manifest, data.alpha_background, backend_of(data))
    lines += [f"  {line}" for line in told]
    for name, texts in captions_by_name(plan.manifest).items():
        share = CaptionLengths(plan.cfg.text).share_cut([text for text in texts.values() if text])
        lines.append(f"  captions{'' if name == MAIN else f' named {name}'}: {share}")
    weights = plan.cfg.data.caption_weights
    if plain := without_weighted(plan.manifest, weights):
        lines.append(
            f"  {plain} with none of the captions of data.caption_weights ({', '.join(weights)}): trained on their "
            "main one"
        )
    return "\n".join(lines)


def clip_table(plan: DataPlan) -> str:
    """Every clip and what becomes of it, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text)
    columns = ("key", "shard", "kind", "codec", "frames", "fps", "width", "height", "duration")
    outcome = ("bucket", "tokens", "reason", "what", "detail", *_FROM_THE_MANIFEST)
    writer.writerow([*columns, *outcome])
    for row in range(len(plan.manifest)):
        known, bucket = plan.manifest.row(row), plan.bucket(row)
        writer.writerow(
            [
                *(known[name] for name in columns),
                bucket.name if bucket else "",
                plan.clip_tokens(row),
                plan.assignment.reasons[row],
                plan.fate(row),
                known["drop_detail"],
                *(known[name] for name in _FROM_THE_MANIFEST),
            ]
        )
    return text.getvalue()


def page(plan: DataPlan, thumbnails: list[Thumbnail]) -> str:
    """The HTML of the report."""
    manifest = plan.manifest
    rows = np.unique(
        np.linspace(0, len(manifest) - 1, min(len(manifest), CLIPS_LISTED)).round().astype(int)
    )
    bucket_settings = {
        "data": {"source": plan.cfg.data.source},
        "buckets": plan.cfg.buckets.model_dump(mode="json"),
    }
    return render(
        "tools/data/report.html",
        title=f"Data of {manifest.root.name or manifest.root}",
        root=manifest.root,
        total=len(manifest),
        used=len(plan.used),
        tiles=_tiles(plan),
        buckets=list(zip(plan.table, plan.clips_per_bucket.tolist(), plan.tokens, strict=True)),
        dropped=_dropped(plan),
        charts=_charts(plan),
        clips=[
            [manifest.key[row], plan.fate(row), plan.framing(row), plan.clip_tokens(row)]
            for row in rows.tolist()
        ],
        table_name=f"{NAME}.csv",
        examples=_examples(plan, thumbnails),
        codecs=_codecs(manifest),
        settings=yaml.safe_dump(bucket_settings, sort_keys=False),
    )


def _tiles(plan: DataPlan) -> dict[str, str]:
    tokens = int((plan.clips_per_bucket * np.array(plan.tokens)).sum())
    return {
        "clips": f"{len(plan.manifest):,}",
        "used": f"{len(plan.used):,}",
        "dropped": f"{len(plan.manifest) - len(plan.used):,}",
        "held out": f"{plan.held_out:,}",
        "of video used": _duration(float(plan.manifest.duration[plan.used].sum())),
        "tokens an epoch": compact(tokens),
    }


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


def _dropped(plan: DataPlan) -> list[dict[str, Any]]:
    """Each reason, the most frequent first, with its count, its meaning and a few clips."""
    counts = sorted(plan.assignment.dropped().items(), key=lambda item: (-item[1], item[0]))
    return [
        {
            "reason": reason.replace("_", " "),
            "count": number,
            "meaning": MEANING.get(reason, ""),
            "examples": [
                (plan.manifest.key[row], _why(plan, row))
                for row in np.flatnonzero(plan.assignment.reasons == reason)[:EXAMPLES]
            ],
        }
        for reason, number in counts
    ]


def _why(plan: DataPlan, row: int) -> str:
    known = (plan.framing(row), plan.fate(row), str(plan.manifest.drop_detail[row]))
    return "; ".join(filter(None, known))


def _charts(plan: DataPlan) -> list[tuple[str, str]]:
    manifest, seen = plan.manifest, plan.manifest.frames > 0
    moving = seen & (manifest.kind == "video")
    drawn = (
        ("Duration", manifest.duration[moving], "seconds"),
        ("Frame rate", manifest.fps[moving], "frames a second"),
        ("Width", manifest.width[seen], "pixels"),
        ("Height", manifest.height[seen], "pixels"),
        ("Frames at the sampling rate", plan.sampled[seen], "frames"),
        ("Tokens of a clip", np.repeat(plan.tokens, plan.clips_per_bucket), "tokens"),
        *_caption_lengths(plan),
    )
    return [(title, histogram(values, unit)) for title, values, unit in drawn if len(values)]


def _caption_lengths(plan: DataPlan) -> list[tuple[str, np.ndarray, str]]:
    """Title, values and unit of a chart for the captions of each name."""
    charts, counted = [], CaptionLengths(plan.cfg.text)
    for name, texts in captions_by_name(plan.manifest).items():
        captions = [text for text in texts.values() if text]
        lengths = np.array([len(text.encode(errors="replace")) for text in captions])
        title = "Caption length" if name == MAIN else f"Length of captions named {name}"
        charts.append((f"{title}; {counted.share_cut(captions)}", lengths, "bytes"))
    return charts


def _examples(
    plan: DataPlan, thumbnails: list[Thumbnail]
) -> list[tuple[str, list[dict[str, str]]]]:
    """The name and the count of each bucket with examples, and what the page shows of them."""
    groups = []
    for number, members in groupby(
        thumbnails, lambda one: int(plan.assignment.bucket_of_row[one.row])
    ):
        count = plan.clips_per_bucket[number]
        title = f"{plan.table[number].bucket.name}: {count:,} clip{'' if count == 1 else 's'}"
        groups.append((title, [_example(plan, one) for one in members]))
    return groups


def _example(plan: DataPlan, one: Thumbnail) -> dict[str, str]:
    return {
        "picture": _picture(one.frames) if one.frames is not None else "",
        "problem": one.problem,
        "caption": _cut(str(plan.manifest.caption[one.row]), CAPTION_SHOWN),
        "key": str(plan.manifest.key[one.row]),
        "fate": plan.fate(one.row),
    }


def _picture(frames: np.ndarray) -> str:
    data = io.BytesIO()
    filmstrip(frames, FRAMES_SHOWN).save(data, format="JPEG", quality=88)
    return base64.b64encode(data.getvalue()).decode()


def _codecs(manifest: Manifest) -> list[tuple[str, str, int]]:
    """Codec, kind of frame rate, and clips."""
    counts = Counter(
        (codec or "not known", "variable" if vfr else "constant")
        for codec, vfr in zip(manifest.codec.tolist(), manifest.vfr.tolist(), strict=True)
    )
    return [(codec, rate, number) for (codec, rate), number in counts.most_common()]


def _cut(text: str, length: int) -> str:
    text = " ".join(text.split()) or "(no caption)"
    return text if len(text) <= length else f"{text[: length - 1]}\u2026"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
