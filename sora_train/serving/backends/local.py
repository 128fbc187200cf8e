"""Our own sampler as a backend: every operation of `sora sample`, videos of any length, in this process.

Windows of a long video wait in the job's folder, so the next attempt goes on from the last of them.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sora_train.base.files import renamed_when_whole
from sora_train.checkpoint.layout import split_step
from sora_train.config.messages import validated
from sora_train.data.decode.video_io import encode_h264
from sora_train.data.index.kinds import media_kind
from sora_train.errors import ConfigError, UserError
from sora_train.models.vae.autoencoder import read_geometry
from sora_train.sampling import api
from sora_train.sampling.given_files import GivenFile
from sora_train.sampling.long.asked import (
    by_storyboard,
    long_request,
    storyboard_window,
    takes_windows,
)
from sora_train.sampling.long.video import make_long
from sora_train.sampling.operations import OPERATIONS, Prepared, SampleRequest, prepare
from sora_train.sampling.pipeline import ClipShape
from sora_train.sampling.prompts.placing import on_latent_frames, with_references
from sora_train.sampling.prompts.script import Cue, Script
from sora_train.sampling.prompts.storyboard import Storyboard, StoryboardFile, one_prompt
from sora_train.sampling.prompts.written import clean
from sora_train.serving.backends.base import BadRequest, Cancelled, Defaults, Retry
from sora_train.serving.jobs.job import Asked, Job, seed_of

EDIT_STRENGTH = 0.6
CONTINUING = ("extend", "extend-back")


@dataclass(frozen=True)
class Making:
    """What one job is made with."""

    asked: Asked
    model: api.Model
    folder: Path
    seed: int
    step: Callable[[int, int], None]
    """Told the steps done and the steps to do; raises Cancelled."""

    @property
    def settings(self) -> dict[str, Any]:
        return {"steps": self.asked.steps, "guidance_scale": self.asked.guidance_scale}

    def clip(self, prepared: Prepared, prompt: str, *, seed: int, part: int, parts: int) -> Any:
        """One clip of the model, the `part`th of so many; not yet finished."""
        spec = api.with_settings(self.model.spec, self.settings)
        (clip,) = self.model.sample(
            [prompt],
            prepared=prepared,
            negative_prompt=self.asked.negative_prompt,
            seed=seed,
            on_step=lambda done: self.step(part * spec.num_steps + done, parts * spec.num_steps),
            **self.settings,
        )
        return clip


class LocalBackend:
    """A run of `sora train`, loaded when the first job comes."""

    name = "local"

    def __init__(
        self,
        ckpt: str,
        *,
        names: Sequence[str] = (),
        adapters: Mapping[str, str] | None = None,
        **loading: Any,
    ):
        """
        Args:
            ckpt: RUN or RUN@STEP.
            names: other names by which requests may call the model.
            adapters: FILE or RUN[:WEIGHT] by the name that requests use; they may use no others.
            loading: as `sora_train.load` takes it: device, dtype, weights.

        Raises:
            UserError: no such run.
        """
        self.ckpt, self.loading = ckpt, loading
        self.run, step = split_step(ckpt)
        self.info = api.checkpoint_info(self.run, step)
        self.geometry = read_geometry(self.info.cfg.vae)
        self.names, self.adapters = tuple(names), dict(adapters or {})
        self._loaded: tuple[tuple[str, ...], api.Model] | None = None

    @cached_property
    def _own_name(self) -> str:
        return self.run.resolve().name

    def models(self) -> list[str]:
        return [*self.names, self._own_name]

    def defaults(self, model: str) -> Defaults:
        shape = self.info.shape
        return Defaults(shape.frames / shape.fps, (shape.width, shape.height), shape.fps)

    # --- what can be made ---

    def check(self, asked: Asked) -> None:
        """Raises BadRequest for what cannot be made."""
        if asked.model not in self.models():
            known = ", ".join(self.models())
            raise BadRequest("model", f"model is '{asked.model}'; choose among {known}")
        unknown = [name for name in asked.adapters if name not in self.adapters]
        if unknown:
            known = ", ".join(self.adapters) or "none"
            raise BadRequest("adapters", f"there is no adapter '{unknown[0]}'; there are {known}")
        with _field("prompt"):
            clean(asked.prompt, "prompt")
        with _field("fps"):
            self._shape(asked, frames=None, size=None)
        with _field("size"):
            self._shape(asked, frames=None)
        with _field("frames"):
            self._shape(asked)
        for name in ("steps", "guidance_scale"):
            with _field(name):
                api.with_settings(self.info.spec, {name: getattr(asked, name)})
        with _field("negative_prompt"):
            spec = api.with_settings(self.info.spec, {"guidance_scale": asked.guidance_scale})
            api.require_guidance(spec, [clean(asked.negative_prompt, "negative_prompt")])
        self._check_files(asked)
        if asked.storyboard is not None:
            with _field("storyboard"):
                _board(asked)
        elif self._is_long(asked):
            if asked.character:
                most = self.info.shape.frames / self._shape(asked, frames=None).fps
                raise BadRequest(
                    "characters", f"videos with characters have {most:g} seconds at most"
                )
            with _field("seconds"):
                long_request(self.info, self._shape(asked), asked.seconds).check()

    def _check_files(self, asked: Asked) -> None:
        """The operation takes what is given."""
        operation = OPERATIONS.get(asked.sampling_op)
        if operation is None:
            raise BadRequest(
                "op", f"op is '{asked.sampling_op}'; choose among {', '.join(OPERATIONS)}"
            )
        if asked.storyboard is not None:
            return
        images = sum(one.kind == "image" for one in asked.uploads)
        videos = len(asked.uploads) - images + int(_shows_source(asked))
        takes_none = not (operation.images or operation.videos)
        by_image = bool(operation.images) and 1 <= images <= len(operation.images) and not videos
        by_video = operation.videos > 0 and videos == operation.videos and not images
        if not (by_image or by_video or (takes_none and not images and not videos)):
            raise BadRequest(
                "input_reference",
                f"op {asked.sampling_op} makes {operation.does}; it got {images} images and {videos} videos, and takes "
                f"{len(operation.images)} images or {operation.videos} videos",
            )

    def _shape(self, asked: Asked, **other: Any) -> ClipShape:
        """Of a clip of the model: of the frames asked for, or its own."""
        given = {"size": asked.size, "frames": asked.frames, "fps": asked.fps} | other
        return api.fitting_shape(self.info.cfg, self.geometry, self.info.shape, **given)

    def _wanted(self, asked: Asked) -> int:
        """Frames that are to be made."""
        return asked.frames or max(1, round(asked.seconds * self._shape(asked, frames=None).fps))

    def _is_long(self, asked: Asked) -> bool:
        """Whether a prompt, or images, become more frames than a clip of the model has."""
        return asked.sampling_op in ("t2v", "i2v") and self._wanted(asked) > self.info.shape.frames

    # --- making it ---

    def make(
        self,
        job: Job,
        inputs: list[Path],
        folder: Path,
        progress: Callable[[int], None],
        cancelled: Callable[[], bool],
    ) -> Path:
        """The video as an mp4 in `folder`. Raises UserError for what cannot be made, Cancelled, Fault."""

        def step(done: int, total: int) -> None:
            if cancelled():
                raise Cancelled
            progress(100 * done // total)

        step(0, 1)
        model = self._model(job.asked.adapters)
        try:
            return self._made(Making(job.asked, model, folder, seed_of(job), step), inputs)
        except UserError as error:
            raise UserError(_of_fields(error)) from error

    def _made(self, making: Making, inputs: list[Path]) -> Path:
        asked, folder = making.asked, making.folder
        count = len(asked.uploads) + int(asked.source is not None)
        files = inputs[: count if _shows_source(asked) else len(asked.uploads)]
        if asked.storyboard is not None:
            return self._by_storyboard(making, files)
        if self._is_long(asked):
            return self._long(making, self._script(asked, files), asked.seconds)
        request = self._request(asked, files)
        if asked.sampling_op in CONTINUING:
            clip, fps = self._continued(making, request)
        else:
            prepared = self._prepared(asked, request, inputs[count:])
            made = making.clip(prepared, asked.prompt, seed=making.seed, part=0, parts=1)
            clip, fps = made, prepared.shape.fps
            if asked.sampling_op in ("t2v", "i2v"):
                clip = clip[: self._wanted(asked)]
        return _written(clip, fps, folder)

    def _model(self, adapters: tuple[str, ...]) -> api.Model:
        """The model with these adapters; the last one is kept."""
        if self._loaded is None or self._loaded[0] != adapters:
            self._loaded = None  # one in memory at a time
            files = [self.adapters[name] for name in adapters]
            try:
                self._loaded = adapters, api.load(self.ckpt, adapters=files, **self.loading)
            except UserError as error:
                # Of files that the server's settings name: no business of a job's owner, and mended without them.
                raise Retry(str(error)) from error
        return self._loaded[1]

    def _request(self, asked: Asked, files: list[Path]) -> SampleRequest:
        """The operation with its files."""
        images = self._images(asked, files)
        videos = tuple(path for path in files if media_kind(path.name) != "image")
        strength = () if asked.strength is None else (asked.strength,)
        op, size = asked.sampling_op, None
        if op == "upscale" or (op == "edit" and videos):
            # An edit of a whole video, however long: in windows, as an upscaled one, at its own size.
            op, size = "upscale", asked.size
            strength = strength or ((EDIT_STRENGTH,) if asked.sampling_op == "edit" else ())
        first, last = images
        given = asked.frames_given, asked.gap, strength
        patch = self.info.cfg.model.patch_size
        return SampleRequest(op, first, last, videos, *given, size=size, patch=patch)

    def _images(self, asked: Asked, files: list[Path]) -> tuple[Path | None, Path | None]:
        """The first and the last image of a clip: one alone is the first, unless its name says `last_image`."""
        images = [path for path in files if media_kind(path.name) == "image"]
        stems = [Path(one.name).stem for one in asked.uploads if one.kind == "image"]
        if stems == ["last_image"]:
            return None, images[0]
        first, last = [*images, None, None][:2]
        return (last, first) if stems[:1] == ["last_image"] else (first, last)

    def _prepared(
        self, asked: Asked, request: SampleRequest, characters: Sequence[Path] = ()
    ) -> Prepared:
        """`characters`: clips that lead in, and are left off."""
        shape = self._shape(asked)
        alpha = self.info.cfg.data.alpha_background
        if characters:
            # They take up to a half of the clip.
            shape = replace(shape, frames=self._whole(2 * self._wanted(asked)))
            files = [GivenFile.open(path, "video", "characters") for path in characters]
            return with_references(files, shape, self.geometry, alpha)
        if request.op == "upscale":
            # Windows have the size of the model's own clips.
            shape = self._shape(asked, size=None)
        elif request.op in ("t2v", "i2v") and asked.frames is None:
            shape = replace(shape, frames=self._whole(self._wanted(asked)))
        return prepare(request, shape, self.geometry, alpha)

    def _whole(self, frames: int) -> int:
        """The next number of frames that the VAE takes."""
        step = self.geometry.frame_step
        return 1 + -(-(frames - 1) // step) * step

    def _continued(self, making: Making, request: SampleRequest) -> tuple[np.ndarray, float]:
        """A video with what comes after it (or before it), clip by clip: each is shown the end of the one before.

        The frames that each adds are kept, so that another attempt goes on behind them.
        """
        asked = making.asked
        prepared = self._prepared(asked, request)
        frames, known_F = prepared.condition_frames, prepared.known_F
        assert frames is not None and known_F is not None
        known = (known_F > 0).numpy()
        wanted = max(1, round(asked.seconds * prepared.shape.fps))
        parts = -(-wanted // int((~known).sum()))
        ahead = asked.sampling_op == "extend"
        made: list[np.ndarray] = []
        shown = frames.pixels[known]
        for part in range(parts):
            pixels = np.zeros_like(frames.pixels)
            pixels[known] = shown
            now = replace(prepared, condition_frames=replace(frames, pixels=pixels))
            now = replace(now, before=None, after=None)
            path = making.folder / f"{asked.sampling_op}-{part:03d}.npy"
            if not path.exists():
                # Each clip has a noise of its own.
                seed = making.seed + part
                clip = making.clip(now, asked.prompt, seed=seed, part=part, parts=parts)
                with renamed_when_whole(path) as partial, partial.open("wb") as file:
                    np.save(file, clip[~known])
            fresh = np.load(path)
            made.append(fresh)
            together = np.concatenate([shown, fresh] if ahead else [fresh, shown])
            shown = together[-known.sum() :] if ahead else together[: known.sum()]
        new = np.concatenate(made if ahead else made[::-1])
        new = new[:wanted] if ahead else new[-wanted:]
        given = frames.pixels[known]
        whole = [prepared.before, given, new] if ahead else [new, given, prepared.after]
        return np.concatenate([part for part in whole if part is not None]), prepared.shape.fps

    def _script(self, asked: Asked, files: list[Path]) -> Script:
        """A prompt from beginning to end, and images at the ends."""
        cues = [Cue(0.0, asked.prompt)]
        shape, factor = self._shape(asked), self.geometry.temporal_factor
        alpha = self.info.cfg.data.alpha_background
        ends = zip(self._images(asked, files), (0, self._wanted(asked) - 1), strict=True)
        for path, at in ends:
            if path is None:
                continue
            image = GivenFile.open(path, "image", "input_reference").frames(shape, alpha)
            first, frames = on_latent_frames(image, at, factor, is_still=True)
            cues.append(Cue(first / shape.fps, frames=frames))
        return Script(tuple(cues))

    def _by_storyboard(self, making: Making, files: list[Path]) -> Path:
        asked = making.asked
        board = _read_board(asked, files, making.folder)
        window = storyboard_window(board, self.info, asked.size, asked.fps)
        source = self.info.cfg.data.source
        texts = [one.text(source) for one in board.prompts.values()]
        long = takes_windows(board, self.info, window)
        prepared, script = by_storyboard(board, self.info, window, texts, long=long)
        if script is not None:
            return self._long(making, script, asked.seconds)
        prompt = one_prompt(texts, board, prepared.shape)
        clip = making.clip(prepared, prompt, seed=making.seed, part=0, parts=1)
        return _written(clip, prepared.shape.fps, making.folder)

    def _long(self, making: Making, script: Script, seconds: float) -> Path:
        asked = making.asked
        request = long_request(self.info, self._shape(asked, frames=None), seconds)
        (path,) = make_long(
            making.model,
            [script],
            request,
            making.folder,
            seed=making.seed,
            negative_prompts=[asked.negative_prompt],
            progress=False,
            on_step=making.step,
            **making.settings,
        )
        return path


def _shows_source(asked: Asked) -> bool:
    """Whether the source's video is worked on; a remix is only told what was asked for it."""
    return asked.source is not None and asked.op != "remix"


def _written(clip: np.ndarray, fps: float, folder: Path) -> Path:
    path = folder / "video.mp4"
    encode_h264(clip, fps, path)
    return path


def _board(asked: Asked) -> dict[str, Any]:
    """The keys of a storyboard's file, checked. Raises UserError."""
    assert asked.storyboard is not None
    values = {"seconds": asked.seconds, "cues": asked.storyboard}
    if asked.negative_prompt:
        values["negative"] = asked.negative_prompt
    try:
        validated(StoryboardFile, values)
    except ConfigError as error:
        raise UserError(str(error).replace("config key", "key")) from None
    return values


def _read_board(asked: Asked, files: list[Path], folder: Path) -> Storyboard:
    """The storyboard with its files, which it names as the uploads are named."""
    values = _board(asked)
    paths = {Path(one.name).name: path for one, path in zip(asked.uploads, files, strict=False)}
    cues = [dict(cue) for cue in values["cues"]]
    for number, cue in enumerate(cues):
        for kind in ("image", "video"):
            if name := cue.get(kind):
                if Path(name).name not in paths:
                    raise UserError(f"cues[{number}] shows {name}, which was not uploaded")
                cue[kind] = str(paths[Path(name).name].absolute())
    path = folder / "storyboard.yaml"
    with renamed_when_whole(path) as partial:
        partial.write_text(yaml.safe_dump(values | {"cues": cues}, allow_unicode=True))
    return Storyboard.read(path)


@contextmanager
def _field(name: str) -> Iterator[None]:
    """What the sampler refuses is a field of the request."""
    try:
        yield
    except BadRequest:
        raise
    except UserError as error:
        raise BadRequest(name, _of_fields(error)) from None


def _of_fields(error: UserError) -> str:
    """A sentence of the sampler about flags, about fields: `--negative-prompt` is `negative_prompt`."""
    return re.sub(r"--([a-z][a-z-]*)", lambda flag: flag[1].replace("-", "_"), str(error))
