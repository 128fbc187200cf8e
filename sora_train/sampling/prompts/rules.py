"""Longer prompts by rules: what a short one leaves open of setting, camera, lighting and style is said.

The prompt itself stays word for word. For a model of the shapes world it is completed within that world's own
captions, since the model has read no others; a prompt that is none of them is left alone.
"""

import re
from collections.abc import Callable, Mapping

from sora_train.base.seeding import key_seed
from sora_train.data.shapes import captions as shapes
from sora_train.data.shapes.world import BACKGROUNDS, LIGHTING, PALETTE, SHAPES, SIZES, STYLES
from sora_train.sampling.prompts.entities import words_of

SHORT = 12
"""Longer prompts are left alone: expanding them costs more adherence than it gains (Seaweed-7B, arXiv:2504.08685)."""

SAID_BY = {
    "setting": "in on at inside outside outdoors indoors under near beside behind through across above background "
    "street beach forest city room field sky sea",
    "camera": "camera shot shots close-up closeup pan pans panning zoom zooms zooming dolly tracking aerial handheld "
    "angle view drone lens timelapse",
    "lighting": "light lights lighting lit sunset sunrise dawn dusk night dark bright sunny cloudy foggy neon candle "
    "candlelight moonlight daylight sunlight shadow shadows dim backlit storm rain",
    "style": "style animation animated cartoon anime film footage documentary photo photorealistic realistic painting "
    "watercolor watercolour sketch drawing render 3d cgi vintage retro claymation stop-motion pixel noir",
}
"""Words by which a prompt says something of the field itself."""
OFFERS = {
    "setting": ("A plain background.", "The background is simple and out of focus."),
    "camera": (
        "Static camera, eye level.",
        "Medium shot, static camera.",
        "Wide shot, static camera.",
    ),
    "lighting": ("Soft daylight.", "Even, natural light.", "Warm evening light."),
    "style": ("Live action.", "Live action with sharp detail."),
}
"""Sentences for a field that is left open, of the kind that captions have (docs/prep.md)."""

_ACTIONS = sorted({text for pair in shapes.ACTIONS.values() for text in pair}, key=len)
_NAME = f"(?:a )?(?:(?:{'|'.join(SIZES)}) )?(?:{'|'.join(PALETTE)}) (?:{'|'.join(SHAPES)})"
_SENTENCE = re.compile(
    rf"(?P<subject>{_NAME}(?: (?:{'|'.join(shapes.RELATIONS.values())}) {_NAME})?)"
    rf"(?: (?P<action>{'|'.join(reversed(_ACTIONS))}))?"
    rf"(?: (?P<setting>on a (?:{'|'.join(BACKGROUNDS)}) background))?"
)
_BEHIND = {
    **{text: "camera" for text in shapes.CAMERAS.values()},
    **{f"{name} light": "lighting" for name in LIGHTING},
    **{f"{name} style": "style" for name in STYLES},
}

Fits = Callable[[str], bool]


def expanded(prompt: str, source: str, seed: int, fits: Fits) -> str:
    """The prompt and what it leaves open, as far as it `fits`; the prompt itself where there is nothing to say.

    Args:
        source: the run's `data.source`.
        seed: of the choice among wordings.
    """
    if source == "shapes":
        return _completed(prompt, seed, fits)
    words = words_of(prompt)
    # The sentences are English, and a prompt in other letters is not.
    if not words or len(words) > SHORT or not prompt.isascii():
        return prompt
    text = prompt if prompt.endswith((".", "!", "?")) else f"{prompt}."
    for name, offers in OFFERS.items():
        if set(words).isdisjoint(SAID_BY[name].split()):
            longer = f"{text} {offers[_choice(seed, prompt, name, len(offers))]}"
            text = longer if fits(longer) else text
    return text if text.removesuffix(".") != prompt else prompt


def shapes_parts(prompt: str) -> dict[str, str] | None:
    """The parts of a caption of the shapes world; None for another text."""
    sentence, *behind = prompt.split(", ")
    match = _SENTENCE.fullmatch(sentence)
    if match is None or any(text not in _BEHIND for text in behind):
        return None
    named = {name: text for name, text in match.groupdict().items() if text}
    named |= {_BEHIND[text]: text for text in behind}
    return named if shapes.joined(named) == prompt else None


def _completed(prompt: str, seed: int, fits: Fits) -> str:
    named = shapes_parts(prompt)
    if named is None:
        return prompt
    offers: Mapping[str, tuple[str, ...]] = {
        "setting": ("on a dark background",),
        "camera": (shapes.CAMERAS["static"],),
        "lighting": tuple(f"{name} light" for name in LIGHTING),
        "style": tuple(f"{name} style" for name in STYLES),
    }
    for name, texts in offers.items():
        longer = {**named, name: texts[_choice(seed, prompt, name, len(texts))]}
        text = shapes.joined(longer)
        if name not in named and len(text.encode()) <= shapes.MAX_CAPTION_BYTES and fits(text):
            named = longer
    return shapes.joined(named)


def _choice(seed: int, prompt: str, name: str, count: int) -> int:
    return key_seed(seed, "upsample", prompt, name) % count
