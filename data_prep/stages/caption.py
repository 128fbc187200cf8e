"""Gives each clip its captions: given ones, a template's, or a model's, checked against the measured camera."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from data_prep.captioning.asking import Ask, described
from data_prep.captioning.camera_words import contradiction
from data_prep.captioning.endpoint import ask_endpoint, check_endpoint
from data_prep.captioning.local_model import ask_model, check_model
from data_prep.captioning.measured import sentences
from data_prep.captioning.schema import Description, prompt, version_of
from data_prep.captioning.settings import CaptionConfig, names_of
from data_prep.captioning.spending import Usage, answer_before, keep_answer, spending_of
from data_prep.media.pictures import jpegs
from data_prep.stage import LATER, Later, Stage, Workspace
from sora_train.data.captions.texts import MAIN, Named, dumped, named_captions, with_main
from sora_train.data.decode.frames import BadClip
from sora_train.errors import UserError

ROWS_AT_ONCE = 16
# Of the JPEG that a model sees.
QUALITY = 90
# Ends of "very low", "low", "medium", "high"; motion is in short sides of the picture a second.
LEVELS = {"motion": (0.01, 0.05, 0.2, 0.6)}
_ASKED: dict[str, Ask] = {"endpoint": ask_endpoint, "model": ask_model}
Row = Mapping[str, Any]


def caption(rows: pa.Table, settings: CaptionConfig, workspace: Workspace) -> pa.Table:
    """A caption for each row; one that failed for now does not keep the others from theirs."""

    def one(row: Row) -> dict[str, Any]:
        try:
            return _columns(row, settings, workspace)
        except Later as error:
            return {"later_reason": error.reason, "later_detail": error.detail}
        except BadClip as error:
            return {"drop_reason": error.reason, "drop_detail": error.detail}

    # A local model runs on all that it may take by itself.
    threads = settings.concurrency if settings.by == "endpoint" else 1
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(one, rows.to_pylist()))
    texts = pa.schema([("drop_reason", pa.string()), ("drop_detail", pa.string()), *LATER])
    empty = dict.fromkeys(texts.names, "")
    schema = pa.unify_schemas([STAGE.adds, texts])
    return pa.Table.from_pylist(
        [dict.fromkeys(schema.names) | empty | row for row in found], schema=schema
    )


def _columns(row: Row, settings: CaptionConfig, workspace: Workspace) -> dict[str, Any]:
    usage, fields = Usage(), dict[str, str]()
    given, named = row["given_caption"] or "", named_captions(row["given_captions"] or "")
    if settings.by in _ASKED:
        description, usage = _description(row, settings, workspace)
        fields = description.fields
        main, named = _of_model(description, settings, given, named)
    else:
        main = given if settings.by == "given" else _filled(settings, row)
    # Before what was measured is written behind it, which agrees by nature.
    against = contradiction(main, fields.get("camera", ""), row.get("camera"))
    told = sentences(row, settings.append, LEVELS if settings.append_as == "words" else {})
    main, captions = with_main(
        _with(main, told), {n: _with(text, told) for n, text in named.items()}
    )
    columns = {
        "caption": main,
        "captions": captions,
        "caption_fields": dumped(fields),
        "caption_source": settings.by if main else "",
        "caption_version": version_of(settings),
        "caption_tokens": usage.tokens,
        "caption_cost": usage.cost,
        "caption_contradicts": against,
    }
    if not main and not settings.allow_empty:
        where = "beside its source" if settings.by == "given" else "to make of its columns"
        detail = f"there is none {where}; set caption.by, or caption.allow_empty=true"
        columns |= {"drop_reason": "no_caption", "drop_detail": detail}
    return columns


def _of_model(
    description: Description, settings: CaptionConfig, given: str, named: Named
) -> tuple[str, Named]:
    """The main caption and the others by name: a model's, and those that people gave."""
    texts: Named = {"short": description.short, "dense": description.dense}
    if description.fields:
        texts["fields"] = description.fields
    others = {name: text for name, text in named.items() if name not in (*texts, MAIN)}
    if given:
        others["given"] = given
    return str(texts[settings.main]), others | texts


def _with(text: Any, told: str) -> Any:
    """A caption, or its fields, with the sentences of what was measured behind it."""
    if not told or not text:
        return text
    if isinstance(text, dict):
        return text | {"measured": told}
    return f"{text} {told}" if text.endswith((".", "!", "?")) else f"{text}. {told}"


def _filled(settings: CaptionConfig, row: Row) -> str:
    """The template with a row's values; none where a value is missing, as half a sentence is no caption."""
    values = {name: row.get(name) for name in names_of(settings.template)}
    if None in values.values() or "" in values.values():
        return ""
    values["camera"] = str(row.get("camera")).replace("_", " ")
    try:
        return " ".join(settings.template.format_map(values).split())
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(
            f"caption.template={settings.template!r} cannot be filled: {error}"
        ) from error


def _description(
    row: Row, settings: CaptionConfig, workspace: Workspace
) -> tuple[Description, Usage]:
    """What a model says of a clip: what it said before to the same request, or its answer now."""
    request = _request(row, settings)
    if before := answer_before(workspace, request):
        return Description(**before["description"]), Usage(**before["usage"])
    spending = spending_of(workspace)
    spending.require_budget(settings)
    frames = jpegs(row, workspace, settings.frames, settings.frame_size, QUALITY)
    description, usage = described(_ASKED[settings.by], settings, frames, request, spending)
    keep_answer(workspace, request, {"description": asdict(description), "usage": asdict(usage)})
    return description, usage


def _request(row: Row, settings: CaptionConfig) -> str:
    """A digest of all that an answer depends on: the clip, the model, and what it is asked."""
    asked = ("by", "model", "model_path", "language", "frames", "frame_size", "version", "request")
    values = [getattr(settings, name) for name in asked]
    text = json.dumps([row["digest"], prompt(settings), values], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _check(settings: CaptionConfig) -> None:
    if settings.by == "template" and not settings.template:
        raise UserError(
            'caption.by=template needs caption.template; give one such as "{camera} shot, {given_caption}"'
        )
    checks: dict[str, Callable[[CaptionConfig], None]] = {
        "endpoint": check_endpoint,
        "model": check_model,
    }
    if settings.by in checks:
        checks[settings.by](settings)


def _check_sources(rows: pa.Table, settings: CaptionConfig) -> None:
    """Raises UserError where captions are to come from the sources and none has one."""
    given = [*rows["given_caption"].to_pylist(), *rows["given_captions"].to_pylist()]
    if settings.by == "given" and not settings.allow_empty and given and not any(given):
        raise UserError(
            f"caption.by=given, but none of {len(rows)} sources has a caption; put captions.jsonl or .txt files beside "
            "them, set caption.by=endpoint, model or template, or caption.allow_empty=true"
        )


def _seconds(row: Row, settings: CaptionConfig) -> float:
    if settings.by == "model":
        return 600.0 * (settings.retries + 1)
    tries = settings.retries + 1 if settings.by == "endpoint" else 0
    return 120.0 + tries * (2 * settings.timeout + settings.max_wait)


STAGE = Stage(
    name="caption",
    run=caption,
    config=CaptionConfig,
    reads=("digest", "camera", "given_caption", "given_captions"),
    reads_also=lambda settings: settings.columns,
    rows_at_once=ROWS_AT_ONCE,
    seconds=_seconds,
    check=_check,
    check_sources=_check_sources,
    adds=pa.schema(
        [
            ("caption", pa.string()),
            ("captions", pa.string()),
            ("caption_fields", pa.string()),
            ("caption_source", pa.string()),
            ("caption_version", pa.string()),
            ("caption_tokens", pa.int64()),
            ("caption_cost", pa.float64()),
            ("caption_contradicts", pa.string()),
        ]
    ),
)
