"""The flags of `sora sample`, and what the text of some of them means."""

from pathlib import Path
from typing import Annotated

import typer

from sora_train.errors import UserError

Ckpt = Annotated[str, typer.Option(help="A run folder, or RUN@STEP for an older checkpoint.")]
Weights = Annotated[
    str,
    typer.Option("--ema", metavar="TAG", help="Another average, one of ema.more: 0.9999; or live."),
]
Out = Annotated[Path, typer.Option(help="Folder for the mp4 files and the contact sheet.")]
Prompt = Annotated[list[str] | None, typer.Option(help="What to show; may be given several times.")]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help="A text file with one prompt a line, or .yaml, .json or .jsonl with texts and fields: docs/generate.md."
    ),
]
Upsample = Annotated[
    str,
    typer.Option(
        metavar="rules|URL",
        help="Make short prompts longer, by rules or by a model at an OpenAI-compatible endpoint: docs/generate.md.",
    ),
]
UpsampleModel = Annotated[
    str,
    typer.Option(help="The model's name at that endpoint; its key is read from SORA_UPSAMPLE_KEY."),
]
Storyboard = Annotated[
    Path | None,
    typer.Option(help="A YAML file of prompts, images and videos at times: docs/generate.md."),
]
Reference = Annotated[
    list[Path] | None,
    typer.Option(help="An image or a video that leads the clip in; may be given several times."),
]
NegativePrompt = Annotated[str, typer.Option(help="What guidance leads away from.")]
Op = Annotated[
    str,
    typer.Option(
        help="What to make: t2v, t2i, i2v, extend, extend-back, infill, connect, loop, edit, upscale."
    ),
]
Image = Annotated[Path | None, typer.Option(help="The image a clip begins with.")]
LastImage = Annotated[Path | None, typer.Option(help="The image a clip ends with.")]
Video = Annotated[
    list[Path] | None, typer.Option(help="The video to work on; twice for --op connect.")
]
FramesGiven = Annotated[
    int | None, typer.Option(min=1, help="Frames taken from each video, at the clip's rate.")
]
Gap = Annotated[
    str | None, typer.Option(metavar="A:B", help="Frames A to B - 1 are made anew (infill).")
]
Strength = Annotated[
    str | None,
    typer.Option(
        metavar="S[,S...]",
        help="How much an edit changes, 0 to 1; several are spread over the clip.",
    ),
]
ConditionNoise = Annotated[
    float, typer.Option(min=0, max=1, help="Noise level at which given frames are shown.")
]
StepCache = Annotated[
    float,
    typer.Option(
        min=0,
        help="Skip the transformer's blocks in steps that change less, such as 0.1; 0: never.",
    ),
]
Size = Annotated[
    str | None, typer.Option(metavar="WxH", help="Pixels; as in training if left out.")
]
Frames = Annotated[
    int | None, typer.Option(min=1, help="Frames of a clip, given ones too; as in training.")
]
Fps = Annotated[
    float | None, typer.Option(help="Frames a second; those of most training clips if left out.")
]
Seed = Annotated[
    int | None,
    typer.Option(help="Seed of the noise, 0 if left out; the same seed gives the same clip."),
]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Solver steps; those of the run if left out.")
]
Solver = Annotated[
    str | None, typer.Option(help="euler, heun or unipc; that of the run if left out.")
]
GuidanceScale = Annotated[float | None, typer.Option(min=1, help="1 switches guidance off.")]
GuidanceScale2 = Annotated[
    float | None, typer.Option(min=0, help="That of the low-noise expert, of a model of two.")
]
OtherExpert = Annotated[
    str,
    typer.Option(metavar="RUN", help="The run of the other expert, where --ckpt holds one of two."),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="In which the transformer multiplies: float32, bfloat16 (half the memory; faster where the processor has "
        "units for it), or auto: float32 on a CPU, elsewhere what the run was trained in.",
    ),
]
ConditionScale = Annotated[
    float | None, typer.Option(min=0, help="Guidance by the given frames; 1 switches it off.")
]
GuidanceInterval = Annotated[
    str | None, typer.Option(metavar="A:B", help="Guide only at noise levels from A to B.")
]
GuidanceRescale = Annotated[
    float | None, typer.Option(min=0, max=1, help="Share of guidance's extra contrast taken back.")
]
Parallel = Annotated[
    str,
    typer.Option(
        metavar="AXIS=N[,...]",
        help="Over what several processes are spread: prompts, guidance, context; or auto.",
    ),
]
Seconds = Annotated[
    float | None,
    typer.Option(
        help="Make a long video of so many seconds, window by window; --frames is a window's length."
    ),
]
AnchorFps = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Rate of the clip that holds a long video together; the lowest trained if left out, 0: none.",
    ),
]
SmoothFps = Annotated[
    float | None,
    typer.Option(help="Make a long video once more at this higher rate, from its own frames."),
]
Refine = Annotated[
    str | None,
    typer.Option(
        metavar="WxH",
        help="Make a long video once more at this larger size, in overlapping parts of the picture.",
    ),
]
Num = Annotated[int, typer.Option(min=1, help="Clips a prompt.")]


def size_of(text: str | None, name: str = "--size") -> tuple[int, int] | None:
    """WxH -> (width, height)."""
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise UserError(f"{name} is '{text}'; write WIDTHxHEIGHT in pixels, for example 64x48")
    return int(width), int(height)


def gap_of(text: str | None) -> tuple[int, int] | None:
    """A:B -> (A, B)."""
    if text is None:
        return None
    first, _, end = text.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise UserError(f"--gap is '{text}'; write FIRST:END in frames, for example 5:13")
    return int(first), int(end)


def levels_of(text: str | None) -> tuple[float, ...]:
    """S,S,... -> numbers."""
    try:
        return () if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--strength is '{text}'; write a number from 0 to 1, or several such as 0.2,0.9"
        ) from None


def interval_of(text: str | None) -> dict[str, float]:
    """A:B -> the settings `guidance_from` and `guidance_to`."""
    if text is None:
        return {}
    lowest, _, highest = text.partition(":")
    try:
        return {"guidance_from": float(lowest), "guidance_to": float(highest)}
    except ValueError:
        raise UserError(
            f"--guidance-interval is '{text}'; write noise levels LOWEST:HIGHEST, for example 0.1:0.8"
        ) from None
