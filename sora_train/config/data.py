"""Where the clips come from, how they fall into buckets, and how they are read."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from sora_train.config.base import Section

# YAML knows no tuples; strict mode would refuse the lists it writes instead.
FloatList = Annotated[tuple[float, ...], Field(strict=False)]
IntList = Annotated[tuple[int, ...], Field(strict=False)]
StrList = Annotated[tuple[str, ...], Field(strict=False)]


class DataConfig(Section):
    source: str = "shapes"
    """`shapes` (the built-in procedural world), a folder of shards, a plain folder of clips, or a
    CSV/JSONL/Parquet table."""
    captions: str = ""
    """A captions file (JSONL/CSV/Parquet with `file` and `caption`) for a plain folder; empty: `captions.jsonl`
    in the folder, else a sidecar .txt per clip."""
    val_source: str = ""
    """Held-out clips for validation, in the same forms as `data.source`; empty: the last `data.val_clips` of
    the source."""
    val_clips: int = Field(8, ge=0)
    """Clips held out of training for validation when `data.val_source` is empty (at most a tenth of the source)."""
    shapes_clips: int = Field(2000, ge=1)
    """Clips rendered when `data.source=shapes`."""
    shapes_val_clips: int = Field(64, ge=1)
    """Held-out clips rendered when `data.source=shapes`."""
    shapes_image_share: float = Field(0.04, ge=0, le=1)
    """Share of single images among the clips rendered when `data.source=shapes`."""
    max_drop_fraction: float = Field(0.01, ge=0, le=1)
    """Largest share of clips that may be dropped (unreadable, no caption, no bucket) before the run refuses
    to go on."""
    allow_empty_captions: bool = False
    """Accept clips without a caption and train them as unconditional."""
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Clips in one micro-batch, or `auto`: as many as cost about `data.micro_batch_tokens` tokens of the
    largest bucket."""
    micro_batch_tokens: int = Field(1024, ge=1)
    """Tokens of the largest bucket that one micro-batch may hold; shorter clips get more of them at the same cost."""
    group: int = Field(8, ge=1)
    """Micro-batches of nearly equal cost that follow each other on the tape, so that ranks finish together: a
    multiple of the ranks that will ever train side by side."""
    min_efficiency: float = Field(0.5, ge=0, le=1)
    """Least share of a step's slots that must hold a micro-batch: where the ranks do not divide
    `train.micro_batches` the slots left over idle, and below this share the run refuses to start."""
    window_shards: int = Field(64, ge=1)
    """Shards whose samples are shuffled together."""
    num_workers: int = Field(2, ge=1)
    """Decode processes a rank. The numbers of the run do not depend on it."""
    prefetch: int = Field(4, ge=1)
    """Most micro-batches read and decoded ahead of the step."""
    prefetch_mb: float = Field(2048.0, ge=0)
    """Most MB of clips (decoded, or their stored latents) that a rank may hold or be making ahead of the step; a
    micro-batch that alone takes more is begun only when its own step comes."""
    decode_timeout: float = Field(60.0, gt=0)
    """Seconds a clip may take to decode before its process is killed and the clip quarantined."""
    read_retries: int = Field(5, ge=0)
    """How often a failed read of remote storage (`http(s)://`, `s3://`, `gs://`) is tried again, after pauses
    that grow, before the run stops."""
    read_timeout: float = Field(30.0, gt=0)
    """Seconds one attempt at reading a clip from remote storage may take before it counts as failed."""
    disk_cache_dir: str = ""
    """Folder on a local disk that keeps what was read from remote storage, shared by all processes of the
    machine; empty: nothing is kept."""
    read_block_mb: float = Field(8.0, gt=0)
    """With `data.disk_cache_dir`, remote shards are read and kept in blocks of this many MB, each once, so that many
    small clips take few requests."""
    disk_cache_gb: float = Field(50.0, gt=0)
    """Bound of `data.disk_cache_dir` in GB; what was not used for longest is removed."""
    decoder: Literal["auto", "pyav", "decord"] = "auto"
    """`auto` uses PyAV; `decord` is refused where its wheel is missing or cannot read a clip's codec."""
    probe: Literal["decode", "packets", "header"] = "decode"
    """How frames are counted when a source is indexed: decode every frame, count packets (faster, trusts the
    file), or take the header's word (fastest; a clip that holds fewer frames is found at its decode)."""
    cache: Literal["none", "latents"] = "none"
    """`latents`: encode every clip once before step 1, in an order of its own, and train from the stored latents."""
    cache_dir: str = ""
    """Where cached latents lie; empty: `cache/` in the run folder. Keys are content addresses, so it may be shared."""

    @field_validator("source")
    @classmethod
    def _source_named(cls, source: str) -> str:
        if not source:
            raise ValueError(
                "data.source is empty; name a folder of clips or shards or a table, for example data.source=my_clips"
            )
        return source

    @model_validator(mode="after")
    def _blocks_fit(self) -> "DataConfig":
        if self.disk_cache_dir and self.disk_cache_gb * 1000 < 8 * self.read_block_mb:
            raise ValueError(
                f"data.disk_cache_gb={self.disk_cache_gb:g} holds fewer than 8 blocks of data.read_block_mb="
                f"{self.read_block_mb:g}; raise the one or lower the other"
            )
        return self


class BucketClass(Section):
    name: str
    """Name shown in reports, e.g. 480p."""
    pixels: int = Field(ge=64)
    """Area of a frame in pixels; each aspect ratio gets the size nearest to it that fits VAE and patch."""
    frames: IntList
    """Clip lengths in frames, each 1 + k * (temporal factor of the VAE). 1 takes images, and clips too short
    for more."""
    aspect_ratios: StrList = ("1:1",)
    """width:height of the buckets."""
    probability: float = Field(1.0, gt=0)
    """Relative weight among the classes that a clip fits."""


class BucketsConfig(Section):
    fps: float = Field(8.0, gt=0)
    """Frame rate clips are sampled at; a slower clip keeps its own rate. The model is told the effective one."""
    max_upscale: float = Field(1.25, ge=1)
    """Clips that would have to be enlarged by more than this factor do not fit a bucket."""
    max_crop: float = Field(0.5, ge=0, lt=1)
    """Largest share of a frame's area that cropping to the bucket's aspect ratio may remove."""
    classes: Annotated[tuple[BucketClass, ...], Field(strict=False)] = (
        BucketClass(name="48px", pixels=2304, frames=(1, 9), aspect_ratios=("1:1", "2:1", "1:2")),
    )
    """Resolution classes; the buckets are their product with durations and aspect ratios."""

    @model_validator(mode="after")
    def _classes_exist(self) -> "BucketsConfig":
        if not self.classes:
            raise ValueError("buckets.classes is empty; give at least one resolution class")
        return self
