"""The output of NeMo Curator and cosmos-curate: `clips/ID.mp4` with `metas/v0/ID.json` beside them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.sources.source import Source, file_source
from sora_train.base.files import read_json
from sora_train.data.captions.texts import dumped

CLIPS, METAS = "clips", "metas/v0"
_CAPTION, _ENHANCED = "_caption", "_enhanced_caption"


def is_curated(folder: Path) -> bool:
    """Whether a folder is laid out as these two write it."""
    return (folder / CLIPS).is_dir() and (folder / METAS).is_dir()


def list_curated(folder: Path) -> list[Source]:
    """Its clips with their captions, and as provenance the source, the times in it and the scores it was given."""
    sources = []
    for path in sorted((folder / CLIPS).glob("*.mp4")):
        meta = read_json(folder / METAS / f"{path.stem}.json") or {}
        main, named = _captions(meta)
        sources.append(
            replace(
                file_source(f"{CLIPS}/{path.name}", str(path)),
                given_caption=main,
                given_captions=dumped(named),
                provenance=dumped(_provenance(meta)),
            )
        )
    return sources


def _captions(meta: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The main caption, the rewritten one where there is one, and the others by the models that wrote them."""
    # A window is a part of the clip that was captioned alone: the clip has the captions of all, in order.
    found: dict[str, list[str]] = {}
    for window in meta.get("windows") or []:
        for name, text in window.items():
            if name.endswith(_CAPTION) and isinstance(text, str) and text.strip():
                found.setdefault(name.removesuffix(_CAPTION), []).append(text.strip())
    texts = {name: " ".join(parts) for name, parts in found.items()}
    enhanced = [name for name in texts if f"{name}{_CAPTION}".endswith(_ENHANCED)]
    first = next(iter([*enhanced, *texts]), "")
    return texts.pop(first, ""), texts


def _provenance(meta: dict[str, Any]) -> dict[str, str]:
    span = meta.get("duration_span") or []
    told = {
        "curated_source": meta.get("source_video"),
        "curated_span": "-".join(f"{float(second):g}" for second in span),
        "curated_aesthetic": meta.get("aesthetic_score"),
        "curated_motion": (meta.get("motion_score") or {}).get("global_mean"),
    }
    return {name: str(value) for name, value in told.items() if value not in (None, "")}
