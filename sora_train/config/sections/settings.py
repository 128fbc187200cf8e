"""Settings of the commands that look at data or prepare it: given as key=value, checked like a run's."""

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from sora_train.config.sections.base import Section
from sora_train.config.sections.data import StrList


class SourceSettings(Section):
    """`sora data ...`"""

    source: str
    """A folder of shards, a plain folder of clips, a CSV/JSONL/Parquet table, or the names of shards: a path or
    an address (http(s)://, s3://, gs://) with `{000..010}`, `{a,b}` or `*` for many."""
    captions: str = ""
    """A captions file for a folder; empty: `captions.jsonl` in it, else a .txt beside each clip."""
    allow_empty_captions: bool = False
    """Keep clips without a caption."""
    probe: Literal["decode", "packets", "header"] = "decode"
    """How frames are counted: decode every frame, count packets (faster, trusts the file), or take the header's
    word and decode the first frame only (fastest, the row is marked unverified)."""
    workers: int = Field(2, ge=1)
    """Processes that look into the clips."""
    work_dir: str = "runs/index"
    """Where the index is kept, so that the next look is instant."""
    limit: int = Field(50, ge=1)
    """Clips listed by `sora data show`."""

    output: str = ""
    """Folder for the manifest of shards, new or one to which shards are added; empty: a folder under `work_dir`."""
    video_key: str = ""
    """Extension of the members that are the clips, several with `;` (`mp4;left.mp4`); empty: any known one."""
    caption_keys: StrList = ("txt", "json")
    """Where captions lie, the first that is there: an extension (`txt`, `short.txt`) or `json:caption.long` for a
    field of a JSON member. `NAME=PLACE` (`short=json:caption.short`) keeps a further caption under that name."""
    duplicate_keys: Literal["refuse", "drop", "per_shard"] = "refuse"
    """A key that occurs again: refuse, drop the later ones (counted), or let each shard have keys of its own."""
    part: str = ""
    """`i/N`: index every N-th shard only, beginning with the i-th (1/4 ... 4/4), on N machines that share `output`."""
    merge: bool = False
    """Write the manifest from what the parts have found, without looking at a shard again."""

    @field_validator("caption_keys")
    @classmethod
    def _named_places(cls, caption_keys: tuple[str, ...]) -> tuple[str, ...]:
        for key in caption_keys:
            name, equals, place = key.partition("=")
            if equals and not (name and place):
                raise ValueError(
                    f"caption_keys holds {key!r}; write NAME=PLACE, such as short=json:caption.short"
                )
        return caption_keys

    @field_validator("part")
    @classmethod
    def _a_part(cls, part: str) -> str:
        share_of(part)
        return part

    @field_validator("source")
    @classmethod
    def _not_built_in(cls, source: str) -> str:
        if source.partition(":")[0] == "shapes":
            raise ValueError(
                f"source={source} is rendered by a run; train with `sora train experiment=quickstart` and "
                "look at the shards in its run folder"
            )
        return source


class ShardSettings(Section):
    """`sora prep shards ...`"""

    input: str
    """A folder of clips and images, or a CSV/JSONL/Parquet table of them."""
    output: str
    """Folder for the tars and the manifest; must be empty or not there yet."""
    captions: str = ""
    """A captions file (JSONL/CSV/Parquet with `file` and `caption`); empty: `captions.jsonl` in the folder, else
    a .txt beside each clip."""
    allow_empty_captions: bool = False
    """Keep clips without a caption."""
    max_shard_mb: int = Field(512, ge=1)
    """Size at which a new tar is begun, in MB."""
    workers: int = Field(2, ge=1)
    """Processes that look into the clips."""


class ReportSettings(Section):
    """`sora data report ...`, beside the overrides of a run."""

    out: str = ""
    """Folder for the page and the picture; empty: data_report in the run folder."""


class TraceSettings(Section):
    """`sora data trace ...`, beside the overrides of a run."""

    steps: str = "0:10"
    """`A:B`: steps from A up to B - 1; the first step is 0."""
    world: int = Field(1, ge=1)
    """Ranks among which the clips are dealt out."""
    out: str = ""
    """A JSONL file for the rows; empty: they are printed."""

    @field_validator("steps")
    @classmethod
    def _a_range(cls, steps: str) -> str:
        first, colon, last = steps.partition(":")
        if not (colon and first.isdigit() and last.isdigit() and int(first) < int(last)):
            raise ValueError(
                f"steps={steps} is not A:B with A below B, such as steps=0:10 for the first ten steps"
            )
        return steps

    @property
    def first(self) -> int:
        return int(self.steps.partition(":")[0])

    @property
    def last(self) -> int:
        """The step after the last one."""
        return int(self.steps.partition(":")[2])


class EncodeSettings(Section):
    """`sora data encode ...`, beside the overrides of a run."""

    output: str = Field(min_length=1)
    """Folder for the shards, new or empty."""
    keep_clips: bool = False
    """Write the clips themselves beside their latents."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type in which latents and embeddings are stored."""
    max_shard_mb: int = Field(512, ge=1)
    """Size at which a new tar is begun, in MB."""
    part: str = ""
    """`i/N`: encode the i-th of N equal shares only, and leave the writing to `merge`."""
    merge: bool = False
    """Write the shards from what the parts have encoded."""

    @field_validator("part")
    @classmethod
    def _a_part(cls, part: str) -> str:
        share_of(part)
        return part

    @model_validator(mode="after")
    def _merge_is_no_part(self) -> "EncodeSettings":
        if self.merge and self.share[1] > 1:
            raise ValueError(f"part={self.part} and merge=true are both given; merge alone")
        return self

    @property
    def folder(self) -> Path:
        return Path(self.output).expanduser()

    @property
    def share(self) -> tuple[int, int]:
        """(i, N) of `part`; (1, 1) is all of the work."""
        return share_of(self.part)

    @property
    def writes(self) -> bool:
        """Whether the shards are written at the end; a part leaves that to the merge."""
        return self.share[1] == 1


class VerifySettings(Section):
    """`sora data verify ...`, beside the overrides of a run."""

    sample: str = "0.1%"
    """How many of the stored clips are encoded again: a share with `%`, or a number of clips."""
    encoded: str = ""
    """The output of `sora data encode` to look at; empty: the run's cache."""

    @field_validator("sample")
    @classmethod
    def _a_share_or_a_number(cls, sample: str) -> str:
        try:
            share = float(sample.removesuffix("%")) / 100 if sample.endswith("%") else math.nan
        except ValueError:
            share = math.nan
        if not (0 < share <= 1 or (sample.isdigit() and int(sample) > 0)):
            raise ValueError(
                f"sample={sample} is neither a share such as 0.1% nor a number of clips such as 20"
            )
        return sample

    @property
    def folder(self) -> Path | None:
        return Path(self.encoded).expanduser() if self.encoded else None

    def count_of(self, stored: int) -> int:
        """How many of so many stored clips are encoded again; one at least."""
        if self.sample.endswith("%"):
            return min(stored, max(1, math.ceil(float(self.sample[:-1]) / 100 * stored)))
        return min(stored, int(self.sample))


def share_of(part: str) -> tuple[int, int]:
    """`i/N` -> (i, N), nothing -> (1, 1). Raises ValueError for any other text."""
    if not part:
        return 1, 1
    number, _, count = part.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ValueError(f"part={part} is not i/N with i from 1 to N, for example part=1/4")
    return int(number), int(count)
