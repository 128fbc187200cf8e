"""Camera movement that a caption claims, against the measured one."""

from __future__ import annotations

import re

STATIC, SHAKE = "static", "shake"
_VIEW = r"\b(?:camera|shot|view|frame|footage|lens|viewpoint)\b"
_MOVES = r"(?:moves?|moving|movements?|glid(?:es?|ing)|slid(?:es?|ing)|track(?:s|ing)?|truck(?:s|ing)?|sweep(?:s|ing)?)"
_PAN = r"(?:pan|pans|panning|panned)"
_TILT = r"(?:tilt|tilts|tilting|tilted)"
_NEAR = r"[^.;]{0,24}?\b"
CLAIMS = {
    "pan_left": rf"\b(?:{_PAN}|{_MOVES})\b{_NEAR}left(?:ward|wards)?\b(?!\s+to\s+right)|\bright[- ]to[- ]left\s+pan\b|"
    rf"\b{_PAN}\b{_NEAR}right to left\b|\bleftward pan\b",
    "pan_right": rf"\b(?:{_PAN}|{_MOVES})\b{_NEAR}right(?:ward|wards)?\b(?!\s+to\s+left)|\bleft[- ]to[- ]right\s+pan\b|"
    r"\brightward pan\b",
    "pan": rf"\b{_PAN}\b",
    "tilt_up": rf"\b{_TILT}\b{_NEAR}up(?:ward|wards)?\b|\bupward tilt\b",
    "tilt_down": rf"\b{_TILT}\b{_NEAR}down(?:ward|wards)?\b|\bdownward tilt\b",
    "tilt": rf"\b{_TILT}\b",
    "zoom_in": r"\bzoom(?:s|ing|ed)?[- ]in\b|\binward zoom\b|\bpush(?:es|ing)?[- ]in\b|"
    r"\bdoll(?:y|ies|ying)[- ](?:in|forward)\b|\bmov(?:es|ing)\s+(?:closer|in|forward)\b",
    "zoom_out": r"\bzoom(?:s|ing|ed)?[- ]out\b|\boutward zoom\b|\bpull(?:s|ing)?[- ](?:back|out|away)\b|"
    r"\bdoll(?:y|ies|ying)[- ](?:out|back)\b|\bmov(?:es|ing)\s+(?:back|backward|backwards|away)\b",
    "zoom": r"\bzoom(?:s|ing|ed)?\b",
    "roll": r"\broll(?:s|ing)?\b|\brotat(?:es?|ing)\b",
    SHAKE: r"\bhand-?held\b|\bshak(?:y|es|ing)\b|\bjitter(?:s|y)?\b",
    STATIC: r"\b(?:static|stationary|fixed|locked[- ](?:off|down)|motionless|tripod)\b|"
    rf"{_VIEW}[^.;]{{0,16}}\b(?:does not|doesn['\u2019]t)\s+move\b|\b(?:remains|stays|holds)\s+still\b|"
    r"\bno camera (?:movement|motion)\b",
}
"""By the name of a movement (of the column camera, or its kind without a direction) what claims it."""
_PATTERNS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in CLAIMS.items()}
_NOT = re.compile(
    r"\b(?:no|not|never|without|neither|nor)\b[^.;,]{0,20}$|n['\u2019]t\b[^.;,]{0,20}$", re.I
)
_CAMERA = re.compile(_VIEW, re.IGNORECASE)


def claims(text: str, is_of_camera: bool = False) -> dict[str, str]:
    """The movements that a text claims of the camera, each with the words that do.

    Of a caption only clauses count that speak of the camera, the shot or the view: a head may tilt too. With
    `is_of_camera` all do.
    """
    found: dict[str, str] = {}
    for clause in re.split(r"[.;,!?]|\b(?:while|as|then|before|and then)\b", text):
        if not is_of_camera and not _CAMERA.search(clause):
            continue
        for name, pattern in _PATTERNS.items():
            match = pattern.search(clause)
            if match and not (name != STATIC and _NOT.search(clause[: match.start()])):
                found.setdefault(name, match[0].strip())
    return found


def contradiction(text: str, field: str, measured: str | None) -> str:
    """What a caption and its field `camera` claim against the measured movement, in words; empty where they agree.

    A movement of the same kind agrees whatever else is claimed, since only the strongest is measured; one of the
    opposite direction never does, nor does a still camera of one that moves.
    """
    claimed = claims(field, is_of_camera=True) | claims(text)
    if not measured or not claimed:
        return ""
    agreeing = [name for name in claimed if _agrees(name, measured)]
    against = [name for name in claimed if _opposes(name, measured, bool(agreeing))]
    if not against:
        return ""
    words = ", ".join(dict.fromkeys(repr(claimed[name]) for name in against))
    return f"{words} against {measured}"


def _agrees(name: str, measured: str) -> bool:
    return name == measured or (name in ("pan", "tilt", "zoom") and _kind(measured) == name)


def _opposes(name: str, measured: str, others_agree: bool) -> bool:
    if _agrees(name, measured):
        return False
    if STATIC in (name, measured):
        return True
    is_opposite = _kind(name) == _kind(measured) and "_" in name and "_" in measured
    return is_opposite or not others_agree


def _kind(name: str) -> str:
    return name.split("_")[0]
