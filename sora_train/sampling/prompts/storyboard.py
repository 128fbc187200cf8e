"""Storyboards: files that say what a video shows when, in prompts, images and videos at times."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from sora_train.config.messages import validated
from sora_train.config.sections.base import Section
from sora_train.config.yaml_files import load_yaml
from sora_train.errors import ConfigError, UserError
from sora_train.models.vae.geometry import Geometry
from sora_train.sampling.given_files import GivenFile
from sora_train.sampling.pipeline import ClipShape
from sora_train.sampling.prompts.file import written
from sora_train.sampling.prompts.placing import Run, on_latent_frames
from sora_train.sampling.prompts.script import Cue, Script
from sora_train.sampling.prompts.written import Written, cleaned


class CueSection(Section):
    """What changes at one moment."""

    at: float = Field(ge=0, allow_inf_nan=False)
    """Seconds from the start."""
    prompt: str | dict[str, Any] = ""
    """A text or fields; holds until the next cue that has one."""
    image: str = ""
    """An image that is seen at this moment, by its path from the storyboard's folder."""
    video: str = ""
    """A video that is seen from this moment on."""
    seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    """How much of the video is shown; all of it if left out."""

    @model_validator(mode="after")
    def _says_something(self) -> "CueSection":
        if not (self.prompt or self.image or self.video):
            raise ValueError("a cue has a prompt, an image or a video; give it one")
        if self.image and self.video:
            raise ValueError("a cue shows an image or a video; leave one out")
        if self.seconds is not None and not self.video:
            raise ValueError(
                "seconds says how much of a video is shown; add video, or leave it out"
            )
        return self

    @property
    def file(self) -> str:
        return self.image or self.video


class StoryboardFile(Section):
    """The keys of a storyboard."""

    seconds: float = Field(gt=0, allow_inf_nan=False)
    """Length of the video."""
    size: str = ""
    """WxH in pixels; as in training if left out."""
    fps: float | None = Field(None, gt=0, lt=1000)
    """Frames a second; those of most training clips if left out."""
    seed: int | None = Field(None, ge=0)
    """Of the noise; 0 if left out."""
    negative: str = ""
    """What guidance leads away from, all along."""
    cues: Annotated[tuple[CueSection, ...], Field(strict=False)]
    """What is seen when, in the order of time."""

    _text = field_validator("negative")(cleaned)

    @model_validator(mode="after")
    def _in_order(self) -> "StoryboardFile":
        for number, (earlier, later) in enumerate(pairwise(self.cues), 1):
            if later.at <= earlier.at:
                raise ValueError(
                    f"cues[{number}] is at {later.at:g} s and cues[{number - 1}], before it, at {earlier.at:g} s; cues "
                    "stand in the order of time, and what belongs to one moment in one cue"
                )
        if self.cues and self.cues[-1].at >= self.seconds:
            raise ValueError(
                f"cues[{len(self.cues) - 1}] is at {self.cues[-1].at:g} s, and the video ends at {self.seconds:g} s; "
                "move it, or raise seconds"
            )
        if not any(cue.prompt for cue in self.cues):
            raise ValueError("cues have no prompt; say at one of them what is to be seen")
        return self


@dataclass(frozen=True)
class Storyboard:
    """A storyboard whose files are there; nothing is known of a model yet."""

    path: Path
    asked: StoryboardFile
    prompts: dict[int, Written]
    """By the number of the cue."""
    files: dict[int, GivenFile]
    told: list[str] = field(default_factory=list)
    """Sentences for the user on what was done, which `script` adds."""

    @classmethod
    def read(cls, path: Path) -> "Storyboard":
        """Raises UserError for whatever cannot be."""
        try:
            asked = validated(StoryboardFile, load_yaml(path))
        except ConfigError as error:
            lines = str(error).replace("config key", "key").replace("config section", "section")
            raise UserError(f"--storyboard {path}: {lines.removeprefix(f'{path} ')}") from None
        prompts: dict[int, Written] = {}
        files: dict[int, GivenFile] = {}
        for number, cue in enumerate(asked.cues):
            where = f"--storyboard {path} cues[{number}]"
            if cue.prompt:
                prompts[number] = written(cue.prompt, where)
                if prompts[number].negative:
                    raise UserError(
                        f"{where} has a negative of its own; write `negative` once, beside seconds"
                    )
            if cue.file:
                kind = "image" if cue.image else "video"
                files[number] = GivenFile.open(path.parent / cue.file, kind, where)
        return cls(path, asked, prompts, files)

    def frames_at(self, fps: float, geometry: Geometry) -> int:
        """Frames of the whole video: what the VAE takes that is nearest to its seconds."""
        step = geometry.frame_step
        return 1 + step * round((self.asked.seconds * fps - 1) / step)

    def script(
        self, shape: ClipShape, geometry: Geometry, texts: dict[int, str], alpha_background: str
    ) -> Script:
        """The cues with their files read, whole latent frames each.

        Args:
            shape: of the whole video.
            texts: what the model reads of each prompt.
            alpha_background: the colour that lies under transparency.

        Raises:
            UserError: a video is too short or too slow, or given frames lie on one another.
        """
        runs = {
            number: self._run(number, file, shape, geometry, alpha_background)
            for number, file in self.files.items()
        }
        for (number, (first, frames)), (other, (start, _)) in pairwise(runs.items()):
            if first + len(frames) > start:
                raise UserError(
                    f"--storyboard {self.path}: cues[{number}] shows its {self.files[number].kind} until "
                    f"{(first + len(frames)) / shape.fps:.3g} s and cues[{other}] its own from "
                    f"{start / shape.fps:.3g} s on; move one, or shorten the first by `seconds`"
                )
        shown = [Cue(first / shape.fps, frames=frames) for first, frames in runs.values()]
        said = [Cue(self.asked.cues[number].at, text) for number, text in texts.items()]
        return Script(tuple(sorted([*said, *shown], key=lambda cue: cue.at)))

    def _run(
        self,
        number: int,
        file: GivenFile,
        shape: ClipShape,
        geometry: Geometry,
        alpha_background: str,
    ) -> Run:
        """The frames of a cue on whole latent frames."""
        cue, factor = self.asked.cues[number], geometry.temporal_factor
        if file.kind == "video" and file.probe.fps < shape.fps * (1 - 1e-3):
            raise UserError(
                f"{file.flag} {file.path} has {file.probe.fps:g} frames a second and the storyboard {shape.fps:g}; set "
                f"fps: {file.probe.fps:g}, or give a video of that rate"
            )
        frames = file.frames(shape, alpha_background)
        if cue.seconds is not None:
            frames = frames[: max(1, round(cue.seconds * shape.fps))]
        at = round(cue.at * shape.fps)
        is_still = file.kind == "image"
        first, given = on_latent_frames(frames, at, factor, is_still=is_still)
        if first >= shape.frames:
            first, given = on_latent_frames(frames, shape.frames - 1, factor, is_still=is_still)
        if not len(given):
            raise UserError(
                f"{file.flag} {file.path} shows {len(frames)} frames, fewer than the {factor} of a latent frame; give "
                "a longer one, or an image"
            )
        given = given[: shape.frames - first]
        notes = [file.crop_note(shape)]
        shown = first + len(given) - 1 if is_still else first
        if abs(shown / shape.fps - cue.at) > 0.5 / shape.fps:
            notes.append(
                f"{file.flag} {file.path} is seen at {shown / shape.fps:.3g} s, not at {cue.at:g} s: a latent frame "
                f"holds {factor} frames"
            )
        if not is_still and len(given) < len(frames):
            notes.append(
                f"{file.flag} {file.path} is shown for {len(given)} of its {len(frames)} frames, which fill latent "
                "frames before the end of the video"
            )
        self.told.extend(filter(None, notes))
        return first, given


def one_prompt(texts: Sequence[str], board: Storyboard, shape: ClipShape) -> str:
    """The prompt of a video that is made in one piece. Raises UserError where it has several."""
    if len(texts) > 1:
        first, second = (board.asked.cues[number].at for number in list(board.prompts)[:2])
        raise UserError(
            f"--storyboard {board.path} has prompts at {first:g} s and {second:g} s, and a model reads one for the "
            f"{shape.frames} frames ({shape.frames / shape.fps:.3g} s) that it makes at once; make the video longer, "
            "or leave one out"
        )
    return texts[0]
