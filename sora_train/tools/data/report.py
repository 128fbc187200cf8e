"""The page, the picture and the table that `sora data report` writes: what becomes of each clip of a source."""

import base64
import csv
import io
import os
from collections import Counter
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np
import yaml

from sora_train.base.contact_sheet import contact_sheet, filmstrip
from sora_train.config import Config
from sora_train.data.captions.choice import captions_by_name, without_weighted
from sora_train.data.captions.texts import MAIN
from sora_train.monitoring.report.charts import histogram
from sora_train.monitoring.report.report import count
from sora_train.tools.data.report_plan import FRAMES_SHOWN, DataPlan, Thumbnail, read_thumbnails

NAME = "data_report"
CLIPS_LISTED = 200
EXAMPLES = 5
CAPTION_SHOWN = 300
MEANING = {
    "too_short": "fewer frames, at the sampling rate, than the shortest bucket takes (buckets.classes)",
    "too_small": "would have to be enlarged by more than buckets.max_upscale",
    "aspect_ratio": "more than buckets.max_crop of the frame would be cut off: add a ratio to buckets.classes",
    "no_caption": "no caption was found (data.captions, data.allow_empty_captions)",
    "unreadable": "cannot be decoded",
    "too_few_frames": "holds fewer frames than the index says",
    "decode_timeout": "takes longer to decode than data.decode_timeout",
    "decoder_crashed": "ends the decode process",
}


def write_data_report(cfg: Config, out: Path) -> tuple[DataPlan, list[Path]]:
    """Write data_report.html, .csv and .png into `out`; returns what was found, and the paths.

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
    found = ("bucket", "tokens", "reason", "what", "detail", "caption", "captions", "scores")
    writer.writerow([*columns, *found])
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
                *(known[name] for name in ("caption", "captions", "scores")),
            ]
        )
    return text.getvalue()


def page(plan: DataPlan, thumbnails: list[Thumbnail]) -> str:
    """The HTML of the report."""
    title = f"Data of {plan.manifest.root.name or plan.manifest.root}"
    parts = [
        _header(title, plan),
        _buckets(plan),
        _dropped(plan),
        _charts(plan),
        _fates(plan),
        _examples(plan, thumbnails),
        _codecs(plan),
        _table_of_buckets(plan.cfg),
    ]
    template = Template(
        files("sora_train.monitoring.report").joinpath("report_template.html").read_text("utf-8")
    )
    return template.substitute(title=escape(title), body="\n".join(filter(None, parts)))


def _header(title: str, plan: DataPlan) -> str:
    used = plan.used
    seconds = float(plan.manifest.duration[used].sum())
    tokens = int((plan.clips_per_bucket * np.array(plan.tokens)).sum())
    dropped = len(plan.manifest) - len(used)
    tiles = {
        "clips": f"{len(plan.manifest):,}",
        "used": f"{len(used):,}",
        "dropped": f"{dropped:,}",
        "held out": f"{plan.held_out:,}",
        "of video used": _duration(seconds),
        "tokens an epoch": count(tokens),
    }
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{name}</span></div>'
        for name, value in tiles.items()
    )
    return (
        f"<h1>{escape(title)}</h1>"
        f'<p class="faint">What training would make of {escape(str(plan.manifest.root))}: '
        f"{len(used):,} used + {dropped:,} dropped = {len(plan.manifest):,} clips. "
        "Held-out clips are left out of the count.</p>"
        f'<div class="tiles">{cells}</div>'
    )


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


def _buckets(plan: DataPlan) -> str:
    most = max(1, int(plan.clips_per_bucket.max(initial=0)))
    rows = []
    for spec, number, tokens in zip(plan.table, plan.clips_per_bucket, plan.tokens, strict=True):
        bar = f'<div class="bar" style="width:{100 * number / most:.1f}%"></div>' if number else ""
        rows.append(
            f"<tr><td>{spec.bucket.name}</td><td>{escape(spec.class_name)}</td>"
            f'<td>{escape(spec.aspect_ratio)}</td><td class="n">{number:,}</td>'
            f'<td class="bars">{bar}</td><td class="n">{tokens:,}</td>'
            f'<td class="n">{count(number * tokens)}</td></tr>'
        )
    return (
        "<h2>Buckets</h2><p>Frames x height x width. Every clip goes to one, or to none with a "
        'reason.</p><div class="scroll"><table><thead><tr><th>bucket</th><th>class</th><th>ratio</th>'
        '<th class="n">clips</th><th></th><th class="n">tokens a clip</th>'
        f'<th class="n">tokens in all</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _dropped(plan: DataPlan) -> str:
    reasons = plan.assignment.reasons
    counts = sorted(plan.assignment.dropped().items(), key=lambda item: (-item[1], item[0]))
    if not counts:
        return '<h2>Dropped</h2><p class="faint">Every clip has a bucket.</p>'
    rows = []
    for reason, number in counts:
        examples = "".join(
            f"<li><code>{escape(str(plan.manifest.key[row]))}</code> {escape(_why(plan, row))}</li>"
            for row in np.flatnonzero(reasons == reason)[:EXAMPLES]
        )
        rows.append(
            f'<tr><td>{escape(reason.replace("_", " "))}</td><td class="n">{number:,}</td>'
            f'<td class="long">{escape(MEANING.get(reason, ""))}<ul>{examples}</ul></td></tr>'
        )
    return (
        '<h2>Dropped</h2><div class="scroll"><table><thead><tr><th>reason</th><th class="n">clips'
        f"</th><th>why, and examples</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _why(plan: DataPlan, row: int) -> str:
    known = (plan.framing(row), plan.fate(row), str(plan.manifest.drop_detail[row]))
    return "; ".join(filter(None, known))


def _charts(plan: DataPlan) -> str:
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
    figures = "".join(
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{histogram(values, unit)}'
        "</figure>"
        for title, values, unit in drawn
        if len(values)
    )
    return f'<h2>Distributions, in clips</h2><div class="charts">{figures}</div>'


def _caption_lengths(plan: DataPlan) -> list[tuple[str, np.ndarray, str]]:
    """Title, values and unit of a chart for the captions of each name."""
    charts, longest = [], plan.cfg.text.max_length
    for name, texts in captions_by_name(plan.manifest).items():
        lengths = np.array([len(text.encode()) for text in texts.values()])
        cut = int((lengths >= longest).sum())  # the end mark takes a byte
        title = "Caption length" if name == MAIN else f"Length of captions named {name}"
        charts.append((f"{title}; {cut:,} are cut at text.max_length={longest}", lengths, "bytes"))
    return charts


def _fates(plan: DataPlan) -> str:
    total = len(plan.manifest)
    rows = np.unique(np.linspace(0, total - 1, min(total, CLIPS_LISTED)).round().astype(int))
    body = "".join(
        f'<tr><td class="long">{escape(str(plan.manifest.key[row]))}</td>'
        f"<td>{escape(plan.fate(row))}</td><td>{escape(plan.framing(row))}</td>"
        f'<td class="n">{plan.clip_tokens(row):,}</td></tr>'
        for row in rows.tolist()
    )
    said = f"{len(rows):,} of {total:,} clips; all are in" if len(rows) < total else "Also in"
    return (
        f"<h2>What becomes of each clip</h2><p>{said} {NAME}.csv.</p>"
        '<div class="scroll"><table><thead><tr><th>clip</th><th>time</th><th>picture</th>'
        f'<th class="n">tokens</th></tr></thead><tbody>{body}</tbody></table></div>'
    )


def _examples(plan: DataPlan, thumbnails: list[Thumbnail]) -> str:
    if not thumbnails:
        return ""
    parts = [
        "<h2>Clips as training sees them</h2><p>Cropped and resized as in the first epoch.</p>"
    ]
    last = None
    for one in thumbnails:
        bucket = plan.bucket(one.row)
        assert bucket is not None, "a clip that is shown has a bucket"
        if bucket != last:
            number = plan.clips_per_bucket[plan.assignment.bucket_of_row[one.row]]
            unit = "clip" if number == 1 else "clips"
            parts.append(f"<h3>{bucket.name}: {number:,} {unit}</h3>")
            last = bucket
        key = escape(str(plan.manifest.key[one.row]))
        caption = _cut(str(plan.manifest.caption[one.row]), CAPTION_SHOWN)
        parts.append(
            f'<figure class="strip">{_picture(one)}<figcaption>{escape(caption)}<br>'
            f'<span class="faint">{key}: {escape(plan.fate(one.row))}</span></figcaption></figure>'
        )
    return "".join(parts)


def _picture(one: Thumbnail) -> str:
    if one.frames is None:
        return f'<span class="tag">not decoded: {escape(one.problem)}</span>'
    data = io.BytesIO()
    filmstrip(one.frames, FRAMES_SHOWN).save(data, format="JPEG", quality=88)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _codecs(plan: DataPlan) -> str:
    manifest = plan.manifest
    found = Counter(
        (codec or "not known", "variable" if vfr else "constant")
        for codec, vfr in zip(manifest.codec.tolist(), manifest.vfr.tolist(), strict=True)
    )
    rows = "".join(
        f'<tr><td>{escape(codec)}</td><td>{rate}</td><td class="n">{number:,}</td></tr>'
        for (codec, rate), number in found.most_common()
    )
    return (
        "<h2>Codecs</h2><table><thead><tr><th>codec</th><th>frame rate</th>"
        f'<th class="n">clips</th></tr></thead><tbody>{rows}</tbody></table>'
    )


def _table_of_buckets(cfg: Config) -> str:
    chosen = {
        "data": {"source": cfg.data.source},
        "buckets": cfg.buckets.model_dump(mode="json"),
    }
    text = escape(yaml.safe_dump(chosen, sort_keys=False))
    return f"<details><summary>Configuration of the buckets</summary><pre>{text}</pre></details>"


def _cut(text: str, length: int) -> str:
    text = " ".join(text.split()) or "(no caption)"
    return text if len(text) <= length else f"{text[: length - 1]}\u2026"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
