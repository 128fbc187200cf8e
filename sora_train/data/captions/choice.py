"""Which of a clip's captions it is trained on.

Models are trained on a mix of short, dense and structured captions, because users write short prompts
and captioners long ones (HunyuanVideo, arXiv:2412.03603, section 3.2), and fields of structured ones
are left out at random (SkyReels-V2, arXiv:2504.13074). Draws are keyed by the sample and its own
epoch, so they do not depend on where and in what order clips are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sora_train.data.captions.texts import MAIN, Fields, Named, as_prompt, named_captions
from sora_train.data.manifest import Manifest
from sora_train.data.transforms import uniform
from sora_train.errors import UserError


@dataclass(frozen=True)
class CaptionChoice:
    """Draws one of the captions of a clip by weight; without weights it is always the main one.

    Each field of a structured caption is left out with the probability `field_dropout`; one always stays.
    """

    seed: int
    weights: Mapping[str, float]
    field_dropout: float = 0.0

    def prompt(self, main: str, captions: str, epoch: int, row: int) -> str:
        """The prompt of a sample in its own epoch; `captions` is the manifest's column.

        A clip that has none of the weighted captions keeps its main one.
        """
        named: Named = {**named_captions(captions), MAIN: main} if self.weights else {}
        chances = [
            (name, weight)
            for name, weight in sorted(self.weights.items())
            if weight > 0 and named.get(name)
        ]
        if not chances:
            return main
        edge = uniform(self.seed, "caption_choice", epoch, row) * sum(w for _, w in chances)
        chosen = chances[-1][0]
        for name, weight in chances:
            edge -= weight
            if edge < 0:
                chosen = name
                break
        caption = named[chosen]
        if isinstance(caption, str):
            return caption
        return as_prompt(self._kept(caption, chosen, epoch, row))

    def _kept(self, fields: Fields, caption: str, epoch: int, row: int) -> Fields:
        """The fields that are not dropped, each by a draw of its own; at least that of the highest draw."""
        draws = {
            name: uniform(self.seed, "caption_field", epoch, row, caption, name) for name in fields
        }
        kept = [name for name in fields if draws[name] >= self.field_dropout]
        return {name: fields[name] for name in kept or [max(draws, key=lambda one: draws[one])]}


def caption_counts(manifest: Manifest) -> Counter[str]:
    """How many clips have a caption of each name, the main one first."""
    counts = Counter({MAIN: int(np.count_nonzero(manifest.caption))})
    for captions in filter(None, manifest.captions.tolist()):
        counts.update(named_captions(captions).keys())
    return +counts


def captions_by_name(manifest: Manifest) -> dict[str, dict[int, str]]:
    """Every caption of a manifest as one text, by name and then by row; the main ones first."""
    by_name = {MAIN: {row: text for row, text in enumerate(manifest.caption.tolist()) if text}}
    for row, captions in enumerate(manifest.captions.tolist()):
        for name, caption in named_captions(captions).items():
            by_name.setdefault(name, {})[row] = as_prompt(caption)
    return {name: texts for name, texts in by_name.items() if texts}


def require_captions(manifest: Manifest, weights: Mapping[str, float]) -> None:
    """Raises UserError where a caption is weighted that no clip of the source has."""
    missing = set(weights)
    if manifest.caption.any():
        missing.discard(MAIN)
    for captions in filter(None, manifest.captions.tolist() if missing else ()):
        missing -= named_captions(captions).keys()
        if not missing:
            break
    if missing:
        names = ", ".join(caption_counts(manifest)) or "none"
        raise UserError(
            f"data.caption_weights names {', '.join(sorted(missing))}, which no clip of {manifest.root} has; "
            f"its captions are: {names} (`sora data index caption_keys=[NAME=PLACE]` names more)"
        )


def without_weighted(manifest: Manifest, weights: Mapping[str, float]) -> int:
    """The number of usable clips that have none of the weighted captions and so keep their main one."""
    drawn = {name for name, weight in weights.items() if weight > 0}
    if not drawn:
        return 0
    return sum(
        not reason and not (MAIN in drawn and main) and drawn.isdisjoint(named_captions(captions))
        for reason, main, captions in zip(
            manifest.drop_reason, manifest.caption, manifest.captions, strict=True
        )
    )


def require_trigger(manifest: Manifest, trigger: str) -> None:
    """Raises UserError where an adapter's trigger word is in no caption that could be trained on."""
    word = trigger.lower()
    used = np.flatnonzero(manifest.drop_reason == "")
    for row in used:
        if (
            word in str(manifest.caption[row]).lower()
            or word in str(manifest.captions[row]).lower()
        ):
            return
    if len(used):
        raise UserError(
            f"adapter.trigger={trigger!r} is in none of the {len(used):,} captions, the first of which is "
            f"{str(manifest.caption[used[0]])!r}; write the word into the captions of what is new, or leave "
            "adapter.trigger empty"
        )
