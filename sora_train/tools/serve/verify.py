"""`sora verify`: where videos come from, and whether that can be believed."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sora_train.errors import EXIT_FAULT, UserError
from sora_train.tools.terminal import JsonFile, table_of, write_json

if TYPE_CHECKING:
    from sora_train.serving.provenance.verdict import Verdict


def verify(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Videos to look at.")],
    anchors: Annotated[
        Path | None,
        typer.Option(metavar="PEM", help="Roots to trust: signatures must lead to one of them."),
    ] = None,
    watermark_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Look for the watermark of the key in this file too."),
    ] = None,
    json: JsonFile = "",
) -> int:
    """Show the C2PA manifest of videos, who signed it, and whether anything was changed since.

    Trusted: signed by somebody who leads to a root of --anchors. Valid: unchanged since it was signed, by whomever.
    Invalid: changed. None: not signed. The exit code is 1 if a file is Invalid or unsigned, or with --anchors not
    Trusted. The watermark is told beside it and does not count.

    \\b
    sora verify video.mp4
    sora verify *.mp4 --anchors serve/dev_certs/mine/anchors.pem --watermark-key watermark.key
    """
    from sora_train.serving.provenance.certificates import read_anchors
    from sora_train.serving.provenance.verdict import verdict
    from sora_train.serving.provenance.watermark import Watermark

    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is no file; name the videos to look at")
    roots = read_anchors(anchors) if anchors is not None else None
    watermark = Watermark.read(watermark_key) if watermark_key is not None else None
    verdicts = [verdict(file, roots, watermark) for file in files]
    if json != "-":
        print("\n\n".join(_page(each) for each in verdicts))
    write_json([_row(each) for each in verdicts], json)
    return 0 if all(each.ok for each in verdicts) else EXIT_FAULT


def _page(verdict: "Verdict") -> str:
    rows = [
        (
            "verdict",
            verdict.state + (f": {', '.join(verdict.failures)}" if verdict.failures else ""),
        )
    ]
    if verdict.issuer:
        rows.append(("signed by", f"{verdict.issuer} ({verdict.signer})"))
        rows.append(("title", verdict.title))
        rows.append(("written by", verdict.generator))
        rows.append(("made by AI", "yes" if verdict.ai else "not said"))
    for action in verdict.actions:
        told = ", ".join(f"{key}={value}" for key, value in sorted(action.parameters.items()))
        rows.append(("action", f"{action.name} {told}".strip()))
    if verdict.parents:
        rows.append(("parents", " <- ".join(verdict.parents)))
    if verdict.watermark is not None:
        found = verdict.watermark
        rows.append(
            (
                "watermark",
                f"{'found' if found.present else 'not found'} (score {found.score:.1f}, "
                f"found from {found.threshold:.1f} on)",
            )
        )
    return table_of((verdict.file, ""), rows)


def _row(verdict: "Verdict") -> dict[str, Any]:
    row = asdict(verdict) | {"ok": verdict.ok}
    if verdict.watermark is not None:
        row["watermark"] |= {
            "present": verdict.watermark.present,
            "chance": verdict.watermark.chance,
        }
    return row
