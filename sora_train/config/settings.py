"""Settings of the commands that look at data or prepare it: given as key=value, checked like a run's."""

from typing import Literal

from pydantic import Field, field_validator

from sora_train.config.base import Section


class SourceSettings(Section):
    """`sora data ...`"""

    source: str
    """A folder of shards, a plain folder of clips, or a CSV/JSONL/Parquet table."""
    captions: str = ""
    """A captions file for a folder; empty: `captions.jsonl` in it, else a .txt beside each clip."""
    allow_empty_captions: bool = False
    """Keep clips without a caption."""
    probe: Literal["decode", "packets"] = "decode"
    """How frames are counted: decode every frame, or count packets (faster, trusts the file)."""
    workers: int = Field(2, ge=1)
    """Processes that look into the clips."""
    work_dir: str = "runs/index"
    """Where the index is kept, so that the next look is instant."""
    limit: int = Field(50, ge=1)
    """Clips listed by `sora data show`."""

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
