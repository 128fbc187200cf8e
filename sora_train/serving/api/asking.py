"""From the fields and files of a request to what a job is asked to make; what can be known is checked here."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sora_train.errors import ConfigError, UserError
from sora_train.serving.api.bodies import Body
from sora_train.serving.api.fields import (
    MOST_FILES,
    CreateFields,
    EditFields,
    ExtendFields,
    Making,
    Reference,
)
from sora_train.serving.api.uploads import Arrived, Visit
from sora_train.serving.errors import BadRequest, NotFound
from sora_train.serving.jobs.job import Asked, Job
from sora_train.serving.service import Service
from sora_train.serving.settings import parse_size

SLOTS = ("input_reference", "image", "last_image", "video")
NO_VIDEO = ("t2i",)
"""Operations of `sora sample` whose result is no video."""


@dataclass(frozen=True)
class Wanted:
    """What is to be made, and its files by the names that they get beside the job."""

    asked: Asked
    arrived: dict[str, Arrived] = field(default_factory=dict)

    @property
    def texts(self) -> list[str]:
        """What is to be seen in a person's words, the prompt first; a negative says what is not."""
        cues = [cue.get("prompt") or "" for cue in self.asked.storyboard or []]
        fields = [list(cue.values()) if isinstance(cue, dict) else [cue] for cue in cues]
        return [self.asked.prompt, *(str(text) for texts in fields for text in texts if text)]

    def reworded(self, words: dict[str, str]) -> "Wanted":
        """The same with other texts in the place of some."""

        def of(said: Any) -> Any:
            if isinstance(said, dict):
                return {name: of(text) for name, text in said.items()}
            return words.get(said, said)

        board = self.asked.storyboard
        cues = board and [
            {**cue, "prompt": of(cue["prompt"])} if "prompt" in cue else cue for cue in board
        ]
        return replace(
            self, asked=replace(self.asked, prompt=of(self.asked.prompt), storyboard=cues)
        )


class Asking:
    """One caller's request with the files that it brought."""

    def __init__(self, service: Service, owner: str, visit: Visit, fetch: Callable[[str], bytes]):
        """`fetch` gives the bytes of an image's address, or raises UserError."""
        self.service, self.owner, self.visit, self.fetch = service, owner, visit, fetch

    # --- the four ways to ask ---

    def create(self, fields: CreateFields, body: Body) -> Wanted:
        """Raises BadRequest."""
        given, source = self._given(fields, body)
        cues, cue_files = self._storyboard(fields, body)
        images = {name: file for name, file in given.items() if file.kind == "image"}
        clips = [file for file in given.values() if file.kind == "video"]
        op = _operation(fields, images, len(clips) + (source is not None))
        model = self._model(fields.model)
        seconds, size = self._extent(fields, model, op, clips, source)
        whole = 0.0
        if op.startswith("extend"):
            whole = clips[0].seconds if clips else _seconds_of(source)
        asked = Asked(
            op="extend" if whole else "edit" if clips or source else "create",
            model=model,
            seconds=seconds,
            size=size,
            sampling_op=op,
            frames=fields.frames,
            fps=fields.fps,
            gap=(fields.gap[0], fields.gap[1]) if fields.gap else None,
            frames_given=fields.frames_given,
            storyboard=cues,
            source=source.id if source else None,
            source_seconds=whole,
            character=self._characters(fields.characters),
            **self._making(fields),
        )
        return self._checked(Wanted(asked, given | cue_files))

    def edit(self, fields: EditFields, body: Body) -> Wanted:
        """Raises BadRequest."""
        clip, source = self._video(fields.video, body)
        size = _size_of(source) if source else _even(clip.size)  # type: ignore[union-attr]
        asked = Asked(
            op="edit",
            model=source.asked.model if source else self._model(None),
            seconds=_seconds_of(source) if source else clip.seconds,  # type: ignore[union-attr]
            size=size,
            sampling_op="edit",
            source=source.id if source else None,
            **self._making(fields),
        )
        return self._checked(Wanted(asked, {"video": clip} if clip else {}))

    def extend(self, fields: ExtendFields, body: Body) -> Wanted:
        """Raises BadRequest."""
        clip, source = self._video(fields.video, body)
        size = _size_of(source) if source else _even(clip.size)  # type: ignore[union-attr]
        asked = Asked(
            op="extend",
            model=source.asked.model if source else self._model(None),
            seconds=fields.seconds,
            size=size,
            sampling_op="extend" if fields.direction == "forward" else "extend-back",
            frames_given=fields.frames_given,
            source=source.id if source else None,
            source_seconds=_seconds_of(source) if source else clip.seconds,  # type: ignore[union-attr]
            **self._making(fields),
        )
        return self._checked(Wanted(asked, {"video": clip} if clip else {}))

    def remix(self, video_id: str, prompt: str) -> Wanted:
        """The same request as the source's, with its seed and another prompt. Raises NotFound, BadRequest."""
        source = self.service.store.get(video_id, self.owner)
        if source is None:
            raise no_video(video_id)
        self._require_done(source, "video_id")
        asked = source.asked
        self._characters(asked.character)  # they may have been deleted since
        names = [
            (upload.name, upload.name.rpartition("/")[2].partition(".")[0])
            for upload in asked.uploads
        ]
        if asked.source is not None and asked.op != "remix":
            # What it was made from goes with it: a remix's own source is the video that it resembles.
            before = self.service.store.get(asked.source, self.owner)
            if before is None or "video" not in before.outputs:
                raise BadRequest("video_id", "The video that this one was made from is gone.")
            names.append((before.outputs["video"], "video"))
        copies = {slot: self._copy(name) for name, slot in names}
        seed = source.facts.get("seed", asked.seed)
        again = replace(asked, op="remix", prompt=prompt, source=source.id, seed=seed, uploads=())
        return self._checked(Wanted(again, copies))

    # --- parts ---

    def _making(self, fields: Making) -> dict[str, Any]:
        offered = self.service.settings.backend.adapters
        for name in fields.adapters:
            if name not in offered:
                known = ", ".join(offered) or "none"
                raise BadRequest(
                    "adapters",
                    f"Invalid value for 'adapters': there is no '{name}'; offered: {known}.",
                )
        names = ("prompt", "negative_prompt", "steps", "guidance_scale", "seed", "strength")
        return {name: getattr(fields, name) for name in names} | {
            "adapters": tuple(fields.adapters)
        }

    def _model(self, name: str | None) -> str:
        offered, names = self.service.backend.models(), self.service.settings.backend.names
        model = offered[0] if name is None else names.get(name, name)
        if model not in offered:
            known = ", ".join([*names, *offered])
            raise BadRequest(
                "model",
                f"Invalid value for 'model': there is no '{name}'; offered: {known}.",
                "model_not_found",
            )
        return model

    def _characters(self, ids: Sequence[str]) -> tuple[str, ...]:
        for one in ids:
            if self.service.store.get_character(one, self.owner) is None:
                raise BadRequest(
                    "characters",
                    f"Invalid value for 'characters': there is no '{one}'.",
                    "not_found",
                )
        return tuple(ids)

    def _given(self, fields: CreateFields, body: Body) -> tuple[dict[str, Arrived], Job | None]:
        """The files by their names, and the video of this server that stands for one."""
        given: dict[str, Arrived] = {}
        source: Job | None = None
        for slot in SLOTS:
            reference: Reference | None = getattr(fields, slot)
            arrived = [self._taken(file, slot) for file in body.files.get(slot, [])]
            if reference is not None and reference.id is not None:
                source = self._source(reference, slot)
            elif reference is not None:
                arrived.append(self._fetched(reference, slot))
            for number, file in enumerate(arrived, 1):
                name = "image" if slot == "input_reference" and file.kind == "image" else slot
                name = "video" if file.kind == "video" and slot == "input_reference" else name
                if (name == "video") != (file.kind == "video"):
                    raise BadRequest(
                        slot, f"'{slot}' is a file of another kind: {file.kind}.", "invalid_file"
                    )
                name = name if number == 1 or name != "video" else f"video_{number}"
                if name in given:
                    raise BadRequest(slot, f"'{slot}' is one {name} too many.")
                given[name] = file
        return given, source

    def _taken(self, file: Any, param: str) -> Arrived:
        return self.visit.take(file.file, param, file.filename or "")

    def _fetched(self, reference: Reference, param: str) -> Arrived:
        if reference.image_url is None:
            raise BadRequest(
                param,
                f"'{param}' must be a file, or an object with image_url; this server keeps no files by file_id.",
            )
        return self._image_at(reference.image_url, param)

    def _image_at(self, url: str, param: str) -> Arrived:
        try:
            data = self.fetch(url)
        except UserError as error:
            text = f"Invalid value for '{param}': {str(error).rstrip('.')}."
            raise BadRequest(param, text, "invalid_image_url") from None
        arrived = self.visit.take(io.BytesIO(data), param)
        if arrived.kind != "image":
            raise BadRequest(
                param, f"'{param}.image_url' leads to a video; upload it.", "invalid_file"
            )
        return arrived

    def _video(self, reference: Reference | None, body: Body) -> tuple[Arrived | None, Job | None]:
        """A file, or a video of this server. Raises BadRequest unless it is one of both."""
        files = body.files.get("video", [])
        if reference is None and len(files) == 1:
            clip = self._taken(files[0], "video")
            if clip.kind != "video":
                raise BadRequest("video", "'video' is an image; send a video.", "invalid_file")
            return clip, None
        if reference is None or reference.id is None:
            raise BadRequest(
                "video",
                "'video' must be one file or {\"id\": ...}; OpenAI's Python client gets an id through as "
                'video=omit, extra_body={"video": {"id": ...}}.',
                "missing_required_parameter" if not files else None,
            )
        return None, self._source(reference, "video")

    def _source(self, reference: Reference, param: str) -> Job:
        if reference.image_url is not None or reference.file_id is not None:
            raise BadRequest(param, f"'{param}' names several things; send one.")
        source = self.service.store.get(str(reference.id), self.owner)
        if source is None:
            raise BadRequest(
                f"{param}.id",
                f"Invalid value for '{param}.id': there is no such video.",
                "not_found",
            )
        self._require_done(source, f"{param}.id")
        return source

    def _require_done(self, source: Job, param: str) -> None:
        if source.status != "completed":
            raise BadRequest(
                param, f"The video is {source.status}; it must be completed.", "video_not_ready"
            )
        if "video" not in source.outputs:
            raise BadRequest(param, "The video's files have expired.", "video_expired")

    def _copy(self, name: str) -> Arrived:
        try:
            with self.service.files.open(name) as file:
                return self.visit.take(file, "video_id")
        except FileNotFoundError:
            raise BadRequest(
                "video_id", "The video's files have expired.", "video_expired"
            ) from None

    def _storyboard(
        self, fields: CreateFields, body: Body
    ) -> tuple[list[dict[str, Any]] | None, dict[str, Arrived]]:
        """The cues with the files that they name in place of the client's names for them."""
        extra = body.files.get("files", [])
        by_name = {file.filename: file for file in extra}
        if fields.storyboard is None:
            if extra:
                raise BadRequest("files", "'files' are shown by a storyboard, and none is given.")
            return None, {}
        if sum(bool(cue.file) for cue in fields.storyboard) > MOST_FILES:
            raise BadRequest(
                "storyboard",
                f"Invalid value for 'storyboard': its cues show at most {MOST_FILES} files.",
            )
        cues, arrived = [], {}
        for number, cue in enumerate(fields.storyboard):
            row = {
                name: value for name, value in cue.model_dump().items() if value not in (None, "")
            }
            if cue.file:
                kind, param = ("image", "video")[not cue.image], f"storyboard[{number}]"
                if cue.file in by_name:
                    file = self._taken(by_name[cue.file], param)
                elif cue.image.startswith(("data:", "http://", "https://")):
                    file = self._image_at(cue.image, param)
                else:
                    raise BadRequest(param, f"{param} names a file that is not among 'files'.")
                if file.kind != kind:
                    raise BadRequest(
                        param,
                        f"{param} shows {kind}, and the file holds {file.kind}.",
                        "invalid_file",
                    )
                row[kind] = f"cue_{number}"
                arrived[f"cue_{number}"] = file
            cues.append(row)
        return cues, arrived

    def _extent(
        self, fields: CreateFields, model: str, op: str, clips: list[Arrived], source: Job | None
    ) -> tuple[float, tuple[int, int]]:
        """Seconds that are made, and the frames' size."""
        settings, defaults = self.service.settings, self.service.backend.defaults(model)
        size = parse_size(fields.size)
        if size is None and (clips or source):
            size = _even(clips[0].size) if clips else _size_of(source)
        size = size or parse_size(settings.size) or defaults.size
        own = clips[0].seconds if clips else _seconds_of(source) if source else 0.0
        if fields.frames is not None and fields.seconds is not None:
            raise BadRequest("frames", "'frames' and 'seconds' both say how long it is; send one.")
        if op in ("edit", "upscale") and own:
            if fields.seconds is not None or fields.frames is not None:
                name = "seconds" if fields.seconds is not None else "frames"
                raise BadRequest(name, f"'{op}' keeps the video's own length; leave out '{name}'.")
            return own, size
        if fields.frames is not None:
            seconds = fields.frames / (fields.fps or defaults.fps)
        else:
            seconds = fields.seconds or (own if op == "infill" else 0.0)
            seconds = seconds or settings.duration or defaults.seconds
        return seconds, size

    def _checked(self, wanted: Wanted) -> Wanted:
        asked, limits = wanted.asked, self.service.settings.limits
        whole = asked.seconds + asked.source_seconds
        if whole > limits.seconds:
            raise BadRequest(
                "seconds",
                f"Invalid value for 'seconds': the video would be {whole:g} s long; at most {limits.seconds:g} s.",
            )
        if asked.fps is not None and asked.fps > limits.fps:
            raise BadRequest(
                "fps", f"Invalid value for 'fps': {asked.fps:g}; at most {limits.fps:g}."
            )
        if asked.negative_prompt and asked.guidance_scale is not None and asked.guidance_scale < 1:
            # The policy judges what a video shows.
            raise BadRequest(
                "guidance_scale",
                f"Invalid value for 'guidance_scale': {asked.guidance_scale:g} with a 'negative_prompt': below 1 it "
                "leads to what is to be avoided; raise it, or leave one out.",
            )
        width, height = asked.size
        if width * height > limits.pixels:
            raise BadRequest(
                "size",
                f"Invalid value for 'size': {width}x{height} has too many pixels; at most {limits.pixels}.",
            )
        if asked.storyboard is not None:
            _require_board(asked)
        return wanted


def no_video(video_id: str) -> NotFound:
    """The same for ids that never were, that were deleted, and that are others'."""
    return NotFound("There is no video with this id.", param="video_id")


def _operation(fields: CreateFields, images: dict[str, Arrived], videos: int) -> str:
    """The operation of `sora sample`. Raises BadRequest where files or values do not fit it."""
    # Not at the top: it brings torch, and the gateway answers before that is loaded.
    from sora_train.sampling.operations import OPERATIONS

    offered = [name for name in OPERATIONS if name not in NO_VIDEO]
    op = fields.operation
    if op is None:
        if videos == 1:
            raise BadRequest("operation", "Say what to do with the video: 'operation' is missing.")
        op = "connect" if videos else "i2v" if images else "t2v"
    if op not in offered:
        raise BadRequest(
            "operation",
            f"Invalid value for 'operation': there is no '{op}'; offered: {', '.join(offered)}.",
        )
    takes = OPERATIONS[op]
    for name in images:
        if name not in takes.images and not name.startswith("cue_"):
            raise BadRequest(name, f"'{op}' takes no '{name}'.")
    by_video = takes.videos > 0 and videos == takes.videos and not images
    by_image = bool(images) and not videos
    if not (by_video or by_image or not (takes.videos or takes.images or videos)):
        needs = " or ".join(
            filter(
                None, [f"{takes.videos} video(s)" if takes.videos else "", "/".join(takes.images)]
            )
        )
        raise BadRequest(
            "operation",
            f"Invalid value for 'operation': '{op}' takes {needs or 'no files'}, got {len(images)} image(s) and "
            f"{videos} video(s).",
        )
    for name in ("strength", "gap", "frames_given"):
        if getattr(fields, name) is not None and name not in takes.also:
            raise BadRequest(name, f"'{op}' takes no '{name}'.")
    if op == "infill" and fields.gap is None:
        raise BadRequest("gap", "'infill' needs 'gap': [first, end] of the frames to make.")
    if op == "upscale" and fields.size is None:
        raise BadRequest("size", "'upscale' needs 'size'.")
    if fields.storyboard is not None and op != "t2v":
        raise BadRequest("storyboard", f"A storyboard shows its own files; '{op}' takes none.")
    return op


def _require_board(asked: Asked) -> None:
    """Raises BadRequest for cues that no storyboard of `sora sample` may have."""
    from sora_train.config.messages import validated
    from sora_train.sampling.prompts.file import written
    from sora_train.sampling.prompts.storyboard import StoryboardFile

    try:
        validated(StoryboardFile, {"seconds": asked.seconds, "cues": asked.storyboard})
    except ConfigError as error:
        text = str(error).splitlines()[0].replace("config key ", "")
        raise BadRequest("storyboard", f"Invalid value for 'storyboard': {text}.") from None
    for number, cue in enumerate(asked.storyboard or []):
        try:
            if "prompt" in cue:
                written(cue["prompt"], f"storyboard[{number}].prompt")
        except UserError as error:
            raise BadRequest(f"storyboard[{number}].prompt", f"{error}.") from None


def _seconds_of(source: Job | None) -> float:
    assert source is not None
    return float(source.facts.get("seconds", source.asked.seconds))


def _size_of(source: Job | None) -> tuple[int, int]:
    assert source is not None
    width, height = source.facts.get("size", source.asked.size)
    return int(width), int(height)


def _even(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] - size[0] % 2, size[1] - size[1] % 2
