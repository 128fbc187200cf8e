"""Captions of scenes: a few short phrasings from a small vocabulary.

The parts always come in the order subject, action, setting, camera, lighting, style. A bit field names
the optional parts, so a caption is a pure function of its scene. Captions are short because a
byte-level text encoder has to learn to read them from scratch.
"""

from __future__ import annotations

from collections.abc import Mapping

from sora_train.data.shapes.scene import Scene, Thing

ARTICLE, SIZE, SYNONYM, SETTING, CAMERA, LIGHTING, STYLE = (1 << bit for bit in range(7))
NUM_PHRASINGS = 1 << 7
MAX_CAPTION_BYTES = 62

# The first wording is the usual one.
ACTIONS: dict[str, tuple[str, str]] = {
    "left": ("moves left", "slides left"),
    "right": ("moves right", "slides right"),
    "up": ("moves up", "rises"),
    "down": ("moves down", "falls"),
    "still": ("stays still", "stands still"),
    "rotate": ("rotates", "spins"),
    "grow": ("grows", "gets bigger"),
    "bounce": ("bounces", "hops"),
}
CAMERAS: dict[str, str] = {
    "static": "static camera",
    "pan_left": "camera pans left",
    "pan_right": "camera pans right",
}
RELATIONS: dict[str, str] = {"left_of": "left of", "above": "above"}


# The parts that are left out where a caption would be too long, in this order.
DISPENSABLE = (STYLE, LIGHTING, CAMERA, ARTICLE, SETTING)


def subject(thing: Thing, phrasing: int, *, size: bool) -> str:
    """A thing in words: article and size where the phrasing has them, colour before shape."""
    words = [thing.colour, thing.shape]
    if size and phrasing & SIZE:
        words.insert(0, thing.size)
    if phrasing & ARTICLE:
        words.insert(0, "a")
    return " ".join(words)


def parts(scene: Scene, phrasing: int) -> dict[str, str]:
    """The parts of the caption of `scene` under `phrasing`, a bit field of the constants above, by name.

    It always names the action and a camera that pans; an image has no action and no camera. A growing
    thing has no fixed size, so none is named.
    """
    named: dict[str, str] = {}
    if scene.relation is None:
        named["subject"] = subject(scene.things[0], phrasing, size=scene.motion != "grow")
        if scene.num_frames > 1:
            named["action"] = ACTIONS[scene.motion][1 if phrasing & SYNONYM else 0]
    else:
        first, second = (subject(thing, phrasing, size=False) for thing in scene.things)
        named["subject"] = f"{first} {RELATIONS[scene.relation]} {second}"
    if phrasing & SETTING:
        named["setting"] = f"on a {scene.background} background"
    if scene.num_frames > 1 and (phrasing & CAMERA or scene.camera != "static"):
        named["camera"] = CAMERAS[scene.camera]
    if phrasing & LIGHTING:
        named["lighting"] = f"{scene.lighting} light"
    if phrasing & STYLE:
        named["style"] = f"{scene.style} style"
    return named


def joined(named: Mapping[str, str]) -> str:
    """The caption of parts: subject, action and setting are one sentence, the others follow behind commas."""
    sentence = " ".join(named[name] for name in ("subject", "action", "setting") if name in named)
    others = [named[name] for name in ("camera", "lighting", "style") if name in named]
    return ", ".join(filter(None, [sentence, *others]))


def describe(scene: Scene, phrasing: int) -> str:
    """The caption of `scene` under `phrasing`."""
    return joined(parts(scene, phrasing))


def shortened(scene: Scene, phrasing: int) -> int:
    """`phrasing` less the optional parts that would make the caption longer than MAX_CAPTION_BYTES."""
    for part in DISPENSABLE:
        if len(describe(scene, phrasing).encode()) > MAX_CAPTION_BYTES:
            phrasing &= ~part
    return phrasing
