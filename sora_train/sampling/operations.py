"""What a clip is made from besides a prompt: images and videos, cut and resized to condition frames.

Each operation is one of the kinds of conditioning that training draws, with the frames that a user
names in place of drawn ones. Files are read, checked and cut here, before any model is loaded.

Of the frames of a video some become latent frames: the first one alone, every `factor` after it
together. So the head of a clip takes 1 + k * factor frames, and what lies behind it k * factor.

Dimension key: T latent frames, F pixel frames.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sora_train.diffusion.condition_frames import pixel_mask
from sora_train.diffusion.condition_masks import ends_mask, kind_for
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.errors import UserError
from sora_train.models.vae.geometry import Geometry
from sora_train.sampling.given_files import GivenFile
from sora_train.sampling.pipeline import ClipShape, ConditionFrames
from sora_train.sampling.upscale import Windows

UPSCALE_STRENGTH = 0.3
"""Noise level from which an upscaled video is made anew: enough for new edges, too little for new things."""


@dataclass(frozen=True)
class Operation:
    """What one operation is called and takes."""

    does: str
    images: tuple[str, ...] = ()
    """Flags of images it takes, one of them at least, where it takes no video."""
    videos: int = 0
    also: tuple[str, ...] = ()
    """Other flags it takes."""


OPERATIONS = {
    "t2v": Operation("a clip from a prompt alone"),
    "t2i": Operation("an image from a prompt alone"),
    "i2v": Operation("a clip that begins or ends with an image", ("image", "last_image")),
    "extend": Operation("what comes after a video", videos=1, also=("frames_given",)),
    "extend-back": Operation("what comes before a video", videos=1, also=("frames_given",)),
    "infill": Operation("the frames of a gap in a video", videos=1, also=("gap",)),
    "connect": Operation("the way from a video to another", videos=2, also=("frames_given",)),
    "loop": Operation("a clip without an end", ("image",), videos=1, also=("frames_given",)),
    "edit": Operation("a video or an image made anew", ("image",), videos=1, also=("strength",)),
    "upscale": Operation(
        "a video or an image larger", ("image",), videos=1, also=("strength", "size")
    ),
}
"""Every operation by its name on the command line."""


@dataclass(frozen=True)
class SampleRequest:
    """An operation with its files, as a user names them."""

    op: str = "t2v"
    image: Path | None = None
    last_image: Path | None = None
    videos: tuple[Path, ...] = ()
    frames_given: int | None = None
    """Frames taken from each video, at the rate of the clip."""
    gap: tuple[int, int] | None = None
    """Frames from the first up to the second, which is not of them, are made anew."""
    strength: tuple[float, ...] = ()
    """Noise level from which an edit starts; several are spread evenly over the clip."""
    alpha_background: str = "black"
    """The colour that lies under transparency; that of the run, which `prepare` sets."""
    size: tuple[int, int] | None = None
    """(width, height) in pixels to which a video is upscaled."""
    patch: tuple[int, int, int] = (1, 2, 2)
    """`model.patch_size` of the run, in whose multiples an upscaled video is divided."""

    def check(self) -> None:
        """Raises UserError for an unknown operation, a missing file or one too many, or an impossible value."""
        if self.op not in OPERATIONS:
            raise UserError(f"--op is '{self.op}'; choose among {', '.join(OPERATIONS)}")
        takes = OPERATIONS[self.op]
        flags = {
            "image": self.image,
            "last_image": self.last_image,
            "frames_given": self.frames_given,
            "gap": self.gap,
            "strength": self.strength or None,
            "size": self.size,
        }
        for name, value in flags.items():
            if value is not None and name not in (*takes.images, *takes.also):
                raise UserError(f"--op {self.op} takes no {_flag(name)}; {_takes(self.op)}")
        images = [name for name in takes.images if flags[name] is not None]
        by_video = takes.videos > 0 and len(self.videos) == takes.videos and not images
        by_image = bool(images) and not self.videos
        by_prompt = not (takes.videos or takes.images or self.videos)
        if not (by_video or by_image or by_prompt):
            raise UserError(
                f"--op {self.op} got {_count(len(images), 'image')} and "
                f"{_count(len(self.videos), 'video')}; {_takes(self.op)}"
            )
        if self.op == "upscale" and self.size is None:
            raise UserError("--op upscale is not told how large; give --size WxH in pixels")
        wrong = [value for value in self.strength if not 0 <= value <= 1]
        if wrong:
            raise UserError(
                f"--strength is {wrong[0]:g}; it must lie between 0 (keep) and 1 (make from noise)"
            )
        if self.strength and max(self.strength) == 0:
            raise UserError("--strength is 0 everywhere, so nothing would change; raise it")
        for path in (self.image, self.last_image, *self.videos):
            if path is not None and not path.is_file():
                raise UserError(f"there is no file {path}; give the path of an image or a video")


@dataclass(frozen=True)
class Prepared:
    """A request with its files read: the condition frames, and what is done with the clip that the model makes."""

    shape: ClipShape
    kind: str
    condition_frames: ConditionFrames | None = None
    known_F: Tensor | None = None
    """1 for frames whose own pixels take the place of the VAE's."""
    before: np.ndarray | None = None
    after: np.ndarray | None = None
    drop: int = 0
    """Frames left off the end, since they are the beginning again."""
    lead: int = 0
    """Frames left off the beginning, since they only lead in."""
    shown: tuple[int, int] | None = None
    """Rows and columns of the picture, where others were added that the VAE needs."""
    told: tuple[str, ...] = ()
    """Sentences on what was done with the files."""

    def finish(self, clip: np.ndarray) -> np.ndarray:
        """The whole video, uint8 (F, H, W, 3), from the clip that was made."""
        if self.known_F is not None and self.condition_frames is not None:
            known = (self.known_F > 0).numpy()[:, None, None, None]
            clip = np.where(known, self.condition_frames.pixels, clip)
        rows, columns = self.shown or clip.shape[1:3]
        clip = clip[self.lead : len(clip) - self.drop, :rows, :columns]
        parts = [part for part in (self.before, clip, self.after) if part is not None]
        return np.concatenate(parts)

    def note(self, spec: DiffusionSpec, op: str) -> str:
        """A sentence where the run was not trained for this, else nothing."""
        shares = {kind: share for kind, share in spec.conditioning if share > 0}
        if self.kind == "t2v" or self.kind in shares:
            return ""
        trained = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in shares.items())
        return (
            f"this run was not trained for {op}, which is {self.kind} (it was for {trained}), so what is made may not "
            f"follow the condition frames; train with objective.conditioning.{self.kind} above 0"
        )


def prepare(
    request: SampleRequest,
    shape: ClipShape,
    geometry: Geometry,
    alpha_background: str = "black",
) -> Prepared:
    """Read a request's files and cut them to the frames of a clip.

    Args:
        alpha_background: the colour that lies under transparency, the run's `data.alpha_background`.
        shape: of the clip to make; an image's has one frame, and a clip made from videos has their
            rate where that is lower.
        geometry: of the VAE.

    Raises:
        UserError: whatever does not fit: `SampleRequest.check`, a file that cannot be read, a video that
            is too short, a number of frames that are no whole latent frames.
    """
    request.check()
    request = replace(request, alpha_background=alpha_background)
    if request.op == "upscale":
        return _upscale(request, shape, geometry)
    if request.op == "t2i" or (request.op == "edit" and request.image):
        shape = replace(shape, frames=1)
    geometry.latent_shape(shape.frames, shape.height, shape.width)
    if request.op in ("t2v", "t2i"):
        return Prepared(shape, "t2v")
    make: Callable[[SampleRequest, ClipShape, Geometry], Prepared] = {
        "i2v": _from_images,
        "extend": _from_video,
        "extend-back": _from_video,
        "infill": _infill,
        "connect": _connect,
        "loop": _from_images if request.image else _connect,
        "edit": _edit,
    }[request.op]
    return make(request, shape, geometry)


def _from_images(request: SampleRequest, shape: ClipShape, geometry: Geometry) -> Prepared:
    kind = "loop" if request.op == "loop" else "i2v"
    if request.last_image:
        kind = "i2v_both" if request.image else "i2v_last"
    num_frames = _latent_frames(shape, geometry, kind, request.op)
    mask_T = ends_mask(num_frames, int(kind != "i2v_last"), int(kind != "i2v"))
    pixels = np.zeros((shape.frames, shape.height, shape.width, 3), np.uint8)
    if request.image:
        pixels[0] = _read(request, request.image, "--image", shape)[0]
    if request.last_image:
        pixels[-1] = _read(request, request.last_image, "--last-image", shape)[0]
    if kind == "loop":
        pixels[-1] = pixels[0]
    return Prepared(shape, kind, ConditionFrames(pixels, kind, mask_T), drop=int(kind == "loop"))


def _from_video(request: SampleRequest, shape: ClipShape, geometry: Geometry) -> Prepared:
    """Extension: the video's end is the clip's head, or its beginning the clip's tail."""
    kind = request.op.replace("-", "_")
    num_frames = _latent_frames(shape, geometry, kind, request.op)
    (video,), shape = _read_videos(request, shape)
    head = kind == "extend"
    k = _condition_latent_frames(
        request, geometry, num_frames, num_frames // 2, num_frames - 1, head=head
    )
    mask_T = ends_mask(num_frames, k, 0) if head else ends_mask(num_frames, 0, k)
    known_F = pixel_mask(kind, mask_T, geometry.temporal_factor)
    count = int(known_F.sum())
    _require(video, count, request.videos[0], shape)
    pixels = np.zeros((shape.frames, *video.shape[1:]), np.uint8)
    if head:
        pixels[:count] = video[-count:]
        before, after = video[:-count], None
    else:
        pixels[-count:] = video[:count]
        before, after = None, video[count:]
    return Prepared(shape, kind, ConditionFrames(pixels, kind, mask_T), known_F, before, after)


def _infill(request: SampleRequest, shape: ClipShape, geometry: Geometry) -> Prepared:
    num_frames = _latent_frames(shape, geometry, "infill", request.op)
    factor = geometry.temporal_factor
    (video,), shape = _read_videos(request, shape)
    _require(video, shape.frames, request.videos[0], shape)
    kept = max(1, num_frames // 3)
    first, end = request.gap or (1 + factor * (kept - 1), 1 + factor * (num_frames - kept - 1))
    head, stop = round((first - 1) / factor) + 1, round((end - 1) / factor) + 1
    near = (1 + factor * (head - 1), 1 + factor * (stop - 1))
    if near != (first, end) or not 1 <= head < stop < num_frames:
        head = min(max(head, 1), num_frames - 2)
        stop = min(max(stop, head + 1), num_frames - 1)
        raise UserError(
            f"--gap {first}:{end} does not lie on whole latent frames inside the clip's "
            f"{shape.frames} frames; the nearest gap is "
            f"{1 + factor * (head - 1)}:{1 + factor * (stop - 1)}"
        )
    mask_T = ends_mask(num_frames, head, num_frames - stop)
    known_F = pixel_mask("infill", mask_T, factor)
    pixels = video[: shape.frames]
    conditions = ConditionFrames(pixels, "infill", mask_T)
    return Prepared(shape, "infill", conditions, known_F, after=video[shape.frames :])


def _connect(request: SampleRequest, shape: ClipShape, geometry: Geometry) -> Prepared:
    """From the end of a video to the beginning of another; a loop leads back to the same one."""
    num_frames = _latent_frames(shape, geometry, "connect", request.op)
    videos, shape = _read_videos(request, shape)
    first, second = videos[0], videos[-1]
    longest = (num_frames - 1) // 2
    k = _condition_latent_frames(
        request, geometry, num_frames, max(1, (num_frames - 1) // 3), longest, head=True
    )
    mask_T = ends_mask(num_frames, k, k)
    known_F = pixel_mask("connect", mask_T, geometry.temporal_factor)
    head, tail = 1 + geometry.temporal_factor * (k - 1), geometry.temporal_factor * k
    _require(first, head, request.videos[0], shape)
    _require(second, tail, request.videos[-1], shape)
    pixels = np.zeros((shape.frames, *first.shape[1:]), np.uint8)
    pixels[:head], pixels[-tail:] = first[-head:], second[:tail]
    conditions = ConditionFrames(pixels, "connect", mask_T)
    if request.op == "loop":
        # The clip's end is the video's beginning, which plays next.
        return Prepared(shape, "connect", conditions, known_F, before=first[:-head], drop=tail)
    return Prepared(shape, "connect", conditions, known_F, first[:-head], second[tail:])


def _edit(request: SampleRequest, shape: ClipShape, geometry: Geometry) -> Prepared:
    if request.image:
        video = _read(request, request.image, "--image", shape)
    else:
        (video,), shape = _read_videos(request, shape)
        _require(video, shape.frames, request.videos[0], shape)
    num_frames = geometry.latent_shape(shape.frames, shape.height, shape.width)[1]
    strength_T = _spread(request.strength or (0.6,), num_frames)
    conditions = ConditionFrames(video[: shape.frames], "t2v", torch.zeros(num_frames), strength_T)
    return Prepared(shape, "t2v", conditions)


def _spread(points: tuple[float, ...], num_frames: int) -> Tensor:
    """A noise level for each latent frame, on straight lines through the points."""
    places = np.linspace(0, len(points) - 1, num_frames)
    return torch.from_numpy(np.interp(places, np.arange(len(points)), points)).float()


def _upscale(request: SampleRequest, shape: ClipShape, geometry: Geometry) -> Prepared:
    """A whole video at another size, made anew a little in windows of `shape`; its last frame, rows and columns are
    repeated up to the next size that VAE and patches take, and cut off again."""
    window = geometry.latent_shape(shape.frames, shape.height, shape.width)[1:]
    kind, flag = ("image", "--image") if request.image else ("video", "--video")
    path = request.image or request.videos[0]
    file = GivenFile.open(path, kind, flag)
    assert request.size is not None
    width, height = request.size
    shape = replace(shape, fps=file.probe.fps or shape.fps, height=height, width=width)
    video = file.frames(shape, request.alpha_background)
    multiples = geometry.frame_step, *(geometry.spatial_factor * n for n in request.patch[1:])
    sizes = len(video) - 1, height, width
    more = [-size % multiple for size, multiple in zip(sizes, multiples, strict=True)]
    video = np.pad(video, [(0, count) for count in more] + [(0, 0)], mode="edge")
    frames, height_made, width_made = video.shape[:3]
    shape = ClipShape(frames, height_made, width_made, shape.fps)
    latent_size = geometry.latent_shape(shape.frames, shape.height, shape.width)[1:]
    strength_T = _spread(request.strength or (UPSCALE_STRENGTH,), latent_size[0])
    windows = Windows.over(latent_size, window, request.patch)
    mask_T = torch.zeros(latent_size[0])
    conditions = ConditionFrames(video, "t2v", mask_T, strength_T, windows)
    told = (f"{path} at {width}x{height} is made in {_count(windows.count, 'window')}",)
    return Prepared(shape, "t2v", conditions, drop=more[0], shown=(height, width), told=told)


def _latent_frames(shape: ClipShape, geometry: Geometry, kind: str, op: str) -> int:
    num_frames = geometry.latent_shape(shape.frames, shape.height, shape.width)[1]
    if kind_for(kind, num_frames) != kind:
        step, needed = geometry.frame_step, 2 if kind_for(kind, 2) == kind else 3
        least = 1 + step * -(-geometry.temporal_factor * (needed - 1) // step)
        raise UserError(
            f"--op {op} leaves nothing to make in a clip of {shape.frames} frames; take --frames "
            f"{least} or more"
        )
    return num_frames


def _condition_latent_frames(
    request: SampleRequest,
    geometry: Geometry,
    num_frames: int,
    default: int,
    most: int,
    *,
    head: bool,
) -> int:
    """How many latent frames `frames_given` are: 1 + k * factor frames at the head, k * factor at the tail."""
    factor = geometry.temporal_factor
    if request.frames_given is None:
        return default
    offset = factor - 1 if head else 0
    k = min(max(round((request.frames_given + offset) / factor), 1), most)
    nearest = factor * k - offset
    if nearest != request.frames_given:
        raise UserError(
            f"--frames-given {request.frames_given} is no whole number of latent frames, or leaves nothing to "
            f"make in a clip of {num_frames} of them; the nearest is {nearest}"
        )
    return k


def _read_videos(request: SampleRequest, shape: ClipShape) -> tuple[list[np.ndarray], ClipShape]:
    """The request's videos at one rate and size, and the shape with that rate."""
    files = [GivenFile.open(path, "video", "--video") for path in request.videos]
    rates = [file.probe.fps for file in files if file.probe.fps > 0]
    shape = replace(shape, fps=min([shape.fps, *rates]))
    return [file.frames(shape, request.alpha_background) for file in files], shape


def _read(request: SampleRequest, path: Path, flag: str, shape: ClipShape) -> np.ndarray:
    """An image of the clip's size, uint8 (1, H, W, 3)."""
    return GivenFile.open(path, "image", flag).frames(shape, request.alpha_background)


def _require(video: np.ndarray, count: int, path: Path, shape: ClipShape) -> None:
    if len(video) < count:
        raise UserError(
            f"--video {path} has {_count(len(video), 'frame')} at {shape.fps:g} a second, and {count} are asked of "
            "it; give a longer video, or lower --frames or --frames-given"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _takes(op: str) -> str:
    """What an operation takes, as the end of a sentence."""
    takes = OPERATIONS[op]
    inputs = []
    if takes.images:
        inputs.append(" or ".join(f"{_flag(name)} FILE" for name in takes.images))
    if takes.videos:
        inputs.append(" ".join(["--video FILE"] * takes.videos))
    return f"it makes {takes.does} and takes {' or '.join(inputs) or 'a prompt alone'}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
