"""What the index found in files that needs care, in lines for the terminal."""

from sora_train.data.decode.probe import TRAITS
from sora_train.data.manifest import Manifest


def told(manifest: Manifest, background: str = "", decoder: str = "pyav") -> list[str]:
    """A line for each trait: how many usable clips have it, and what is done.

    `background` is `data.alpha_background`, `decoder` the one that the run names, where they are known.
    """
    counted = manifest.traits_counted()
    value = f"={background}" if background else ""
    lines = [
        f"  {counted[trait]} {what.format(background=value)}"
        for trait, what in TRAITS.items()
        if trait in counted
    ]
    if lines and decoder != "pyav":
        number = int(((manifest.traits != "") & (manifest.drop_reason == "")).sum())
        lines.append(
            f"  {number} of these clips are read by PyAV, as {decoder} would show them otherwise"
        )
    return lines
