"""Writes a run as TensorBoard events: scalars, contact sheets, and clips as moving GIFs.

They lie in RUN/tensorboard; `tensorboard --logdir runs` shows all runs below a folder.
"""

import io
import json
import time
from pathlib import Path
from typing import Any

import av
from PIL import Image

from sora_train.errors import UserError

MAX_FRAMES = 64
"""Frames of a GIF; longer clips are shown by every n-th."""
MAX_WIDTH = 320


class TensorBoardSink:
    """Event files. They are flushed after every push, so what was sent is safe at once."""

    name = "tensorboard"

    def __init__(self, run_dir: Path):
        self._events, self._summaries, writer = _import_tensorboard()
        self._writer = writer(str(run_dir / "tensorboard"))

    def confirmed_step(self) -> int:
        return -1

    def config(self, values: dict[str, Any]) -> None:
        text = "```\n" + json.dumps(values, indent=1) + "\n```"
        self._add(0, time.time(), [self._text("config", text)])

    def row(self, step: int, wall_time: float, values: dict[str, float]) -> None:
        scalar = self._summaries.Summary.Value
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self._add(
            step,
            wall_time,
            [scalar(tag=name, simple_value=value) for name, value in numbers.items()],
        )

    def samples(self, step: int, clips: list[tuple[Path, str]], sheet: Path | None) -> None:
        pictures = [
            self._picture(f"samples/{number:03d}", *_gif(clip), about=prompt)
            for number, (clip, prompt) in enumerate(clips)
        ]
        if sheet is not None:
            with Image.open(sheet) as image:
                size = image.size
            picture = self._picture("samples/contact_sheet", sheet.read_bytes(), size, about="")
            pictures.append(picture)
        self._add(step, time.time(), pictures)

    def alert(self, step: int, title: str, text: str) -> None:
        self._add(step, time.time(), [self._text("events", f"**{title}** {text}")])

    def flush(self) -> bool:
        self._writer.flush()
        return True

    def close(self) -> None:
        self._writer.close()

    def _text(self, tag: str, text: str) -> Any:
        value = self._summaries.Summary.Value(tag=tag)
        value.metadata.plugin_data.plugin_name = "text"
        value.tensor.dtype = 7  # DT_STRING of TensorFlow's types.proto
        value.tensor.tensor_shape.dim.add(size=1)
        value.tensor.string_val.append(text.encode())
        return value

    def _picture(self, tag: str, data: bytes, size: tuple[int, int], about: str) -> Any:
        image = self._summaries.Summary.Image(
            width=size[0], height=size[1], colorspace=3, encoded_image_string=data
        )
        value = self._summaries.Summary.Value(tag=tag, image=image)
        value.metadata.summary_description = about
        return value

    def _add(self, step: int, wall_time: float, values: list[Any]) -> None:
        summary = self._summaries.Summary(value=values)
        self._writer.add_event(self._events.Event(wall_time=wall_time, step=step, summary=summary))


def _gif(clip: Path) -> tuple[bytes, tuple[int, int]]:
    """A clip as GIF bytes, and their width and height."""
    with av.open(str(clip)) as container:
        rate = float(container.streams.video[0].average_rate or 8)
        frames = [frame.to_image() for frame in container.decode(video=0)]
    stride = -(-len(frames) // MAX_FRAMES)
    frames = frames[::stride]
    for frame in frames:
        frame.thumbnail((MAX_WIDTH, MAX_WIDTH))
    data = io.BytesIO()
    frames[0].save(
        data,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        loop=0,
        duration=max(20, round(1000 * stride / rate)),
    )
    return data.getvalue(), frames[0].size


def _import_tensorboard() -> tuple[Any, Any, Any]:
    """Its two modules of messages, and its writer of event files. Neither needs TensorFlow."""
    try:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise UserError(
            "tracker=tensorboard needs the package tensorboard, which is not installed: "
            "run `pip install sora_train[tensorboard]` or set tracker=none."
        ) from error
    return event_pb2, summary_pb2, EventFileWriter
