"""Settings of the commands that look at data or prepare it: given as key=value, checked like a run's."""

from typing import Literal

from pydantic import Field, field_validator

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
        number, _, count = part.partition("/")
        if part and not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
            raise ValueError(f"part={part} is not i/N with i from 1 to N, for example part=1/4")
        return part

    @field_validator("source")
    @classmethod
    def _not_built_in(cls, source: str) -> str:
        if source == "shapes":
            raise ValueError(
                "source=shapes is rendered by a run; train with `sora train experiment=quickstart` and "
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
