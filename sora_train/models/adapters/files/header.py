"""What an adapter's file says of itself in its header, under the names that others look for where there are any.

`ss_*` are kohya's, `modelspec.*` those of Stability AI's ModelSpec; what neither has begins with `sora_train.`.
"""

from collections.abc import Mapping

from sora_train.models.adapters.factors import AdapterFacts

TITLE, TRIGGER = "modelspec.title", "modelspec.trigger_phrase"
RANK, ALPHA, STEPS, BASE = "ss_network_dim", "ss_network_alpha", "ss_steps", "ss_sd_model_name"
DIGEST, RSLORA, VERSION = "sora_train.base_digest", "sora_train.rslora", "sora_train.version"
_OTHER_TRIGGERS = ("ss_trigger_words", "trigger_words", "trigger_phrase", "trigger_word")
"""What others call the words."""


def header_of(about: AdapterFacts, title: str) -> dict[str, str]:
    """The entries of a header; what is not known is left out."""
    entries = {
        "format": "pt",
        TITLE: title,
        TRIGGER: about.trigger,
        RANK: _text(about.rank),
        ALPHA: _text(about.alpha),
        RSLORA: "" if about.rslora is None else str(about.rslora).lower(),
        STEPS: _text(about.steps),
        BASE: about.base,
        DIGEST: about.base_digest,
        VERSION: about.version,
    }
    return {name: text for name, text in entries.items() if text}


def facts_of(header: Mapping[str, str]) -> AdapterFacts:
    """What a header says, ours or another tool's; what cannot be read is not known (kohya's `Dynamic` rank)."""
    rank, steps = _number(header.get(RANK)), _number(header.get(STEPS))
    triggers = [header[name] for name in (TRIGGER, *_OTHER_TRIGGERS) if header.get(name)]
    return AdapterFacts(
        rank=None if rank is None else int(rank),
        alpha=_number(header.get(ALPHA)),
        rslora={"true": True, "false": False}.get(header.get(RSLORA, "")),
        base_digest=header.get(DIGEST, ""),
        base=header.get(BASE, ""),
        trigger=triggers[0] if triggers else "",
        steps=None if steps is None else int(steps),
        version=header.get(VERSION, ""),
    )


def _text(number: float | None) -> str:
    return "" if number is None else f"{number:.12g}"


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
