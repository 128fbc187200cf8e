"""Where the clips come from, how they fall into buckets, and how they are read."""

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from sora_train.config.sections.base import Section

# YAML knows no tuples; strict mode would refuse the lists it writes instead.
FloatList = Annotated[tuple[float, ...], Field(strict=False)]
IntList = Annotated[tuple[int, ...], Field(strict=False)]
StrList = Annotated[tuple[str, ...], Field(strict=False)]


class SourceConfig(Section):
    name: str
    """Name of the source in `data.mix`, in the card and in reports."""
    source: str
    """Where its clips are, in any form of `data.source`."""
    captions: str = ""
    """A captions file for a plain folder, like `data.captions`."""
    clips: int = Field(0, ge=0)
    """Clips rendered where the source is `shapes`; 0: `data.shapes_clips`."""


class MixConfig(Section):
    from_step: int = Field(0, ge=0)
    """Step from which this mix counts; that of the first mix is 0."""
    weights: dict[str, float] = {}
    """Source name -> its share of the clips, in any unit; a source that is not named is not used. An epoch is then the
    shortest one in which every clip of the used sources comes at least once."""
    repeats: dict[str, float] = {}
    """Source name -> how often each of its clips comes in an epoch (0.5: every second clip, and the others in the next
    epoch; 0: never); the clips of a source that is not named come once."""

    def meets(self, name: str) -> bool:
        """Whether the source is met at all."""
        return self.weights.get(name, 0.0) > 0 if self.weights else self.repeats.get(name, 1.0) > 0


class DataConfig(Section):
    source: str = "shapes"
    """`shapes` (the built-in procedural world; `shapes:orange` is in a colour that it does not have otherwise), a
    folder of shards, a plain folder of clips, or a CSV/JSONL/Parquet table."""
    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False)] = ()
    """Several sources at once, instead of `data.source` (set that to '')."""
    mix: Annotated[tuple[MixConfig, ...], Field(strict=False)] = ()
    """How often the clips of each of `data.sources` are trained, by ranges of steps; empty: once an epoch."""
    captions: str = ""
    """A captions file (JSONL/CSV/Parquet with `file` and `caption`) for a plain folder; empty: `captions.jsonl`
    in the folder, else a sidecar .txt per clip."""
    exclude: str = ""
    """A file of clips that are left out: a key a line, or the CSV of `sora data ledger`. A resumed run with another
    file leaves its clips out from that step on; clips that are no longer in it join at the end of the epoch."""
    val_source: str = ""
    """Held-out clips for validation, in any form of `data.source`; empty: the last `data.val_clips` of the source."""
    val_clips: int = Field(8, ge=0)
    """Clips held out of training for validation when `data.val_source` is empty (at most a tenth of the source)."""
    shapes_clips: int = Field(2000, ge=1)
    """Clips rendered when `data.source=shapes`."""
    shapes_val_clips: int = Field(64, ge=1)
    """Held-out clips rendered when `data.source=shapes`."""
    shapes_image_share: float = Field(0.04, ge=0, le=1)
    """Share of single images among the clips rendered when `data.source=shapes`."""
    shapes_motions: StrList = ()
    """Motions that go on, once a second: some of still, rotate, bounce. Things are then alone under a static camera;
    empty: the whole world, where a motion takes the whole clip."""
    shapes_lengths: dict[str, float] = {}
    """FRAMES@FPS -> share of the clips rendered with `data.shapes_motions`, such as {33@8: 0.6, 33@24: 0.4}; empty: 9
    to 17 frames at 8 to 16 frames a second."""
    max_drop_fraction: float = Field(0.01, ge=0, le=1)
    """Largest share of clips that may be dropped (unreadable, no caption, no bucket); beyond it the run stops."""
    allow_empty_captions: bool = False
    """Accept clips without a caption, and train them with the empty caption."""
    caption_weights: dict[str, float] = {}
    """Name of a caption -> the weight with which it is drawn each time a clip is trained, such as
    {caption: 0.5, short: 0.3, fields: 0.2}. A clip with none of these takes its main one, `caption`. Empty: always the
    main one."""
    caption_field_dropout: float = Field(0.1, ge=0, le=1)
    """Probability that a field of a structured caption is left out; one field is always kept."""
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto", "table"] = "auto"
    """Clips in one micro-batch. `auto`: for each bucket as many as cost what `data.micro_batch_tokens` tokens of the
    largest bucket cost, and as fit `data.memory_gb`; `table`: by `data.micro_batch_table`."""
    micro_batch_table: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Clips in one micro-batch of each bucket, by its name, such as {65x256x448: 2, 1x256x448: 64}; with
    `data.micro_batch=table` only."""
    micro_batch_tokens: int = Field(1024, ge=1)
    """Most tokens of the largest bucket in one micro-batch; smaller buckets get more clips at the same cost."""
    memory_gb: float = Field(0.0, ge=0)
    """Memory of one rank in GB (10^9 bytes) that the weights and the activations of one micro-batch may take, by the
    estimate in models/memory.py; 0: no limit."""
    cost_a: float = Field(0.0, ge=0)
    """Cost of a clip of S tokens is cost_a * S + cost_b * S^2; both 0: the model's floating-point operations.
    `sora bench cost` measures the two."""
    cost_b: float = Field(0.0, ge=0)
    """See `data.cost_a`; only the ratio of the two matters."""
    group: int = Field(8, ge=1)
    """Number of micro-batches of nearly equal cost that follow each other, so that ranks finish at the same time; a
    multiple of the data-parallel ranks that the run will ever have. They mix images and lengths of video as far as
    ranks then wait less than 2 % of the time; where a step has three groups or more, few images get one of them."""
    window_shards: int = Field(64, ge=1)
    """Number of shards whose samples are shuffled together."""
    num_workers: int = Field(2, ge=1)
    """Decode processes of each rank; losses do not depend on it."""
    prefetch: int = Field(4, ge=1)
    """Most micro-batches that are read and decoded ahead of the step."""
    prefetch_mb: float = Field(2048.0, ge=0)
    """Most MB of clips, decoded or as stored latents, that a rank prepares ahead of the step. A micro-batch that alone
    takes more is begun when its own step comes."""
    decode_timeout: float = Field(60.0, gt=0)
    """Seconds a clip may take to decode before its process is killed and the clip quarantined."""
    read_retries: int = Field(5, ge=0)
    """How often a failed read of remote storage (`http(s)://`, `s3://`, `gs://`) is tried again, after growing pauses,
    before the run stops."""
    read_timeout: float = Field(30.0, gt=0)
    """Seconds one attempt at reading a clip from remote storage may take before it counts as failed."""
    disk_cache_dir: str = ""
    """Folder on a local disk for a cache of what was read from remote storage, shared by all processes of the machine;
    empty: no cache."""
    read_block_mb: float = Field(8.0, gt=0)
    """Size in MB of the blocks in which remote shards are read and kept in `data.disk_cache_dir`, so that many small
    clips take few requests."""
    disk_cache_gb: float = Field(50.0, gt=0)
    """Largest size of `data.disk_cache_dir` in GB; the least recently used blocks are removed."""
    decoder: Literal["auto", "pyav", "decord", "torchcodec"] = "auto"
    """`auto` takes for each kind of clip and pattern of access the fastest that the index measured among those with
    PyAV's pixels, and PyAV where nothing was measured; `decord` is refused where its wheel is missing or cannot read a
    clip's codec, `torchcodec` where it is missing."""
    alpha_background: str = "black"
    """Colour (a CSS name or `#rrggbb`) that is laid under transparent pictures and videos."""
    hdr: Literal["tonemap", "drop"] = "tonemap"
    """Clips in HDR (PQ, HLG): `tonemap` shows them as SDR, by the curve in data/decode/hdr.py; `drop` leaves them out,
    with the reason `hdr`."""
    probe: Literal["decode", "packets", "header"] = "decode"
    """How frames are counted when a source is indexed: decode every frame, count packets (faster, trusts the
    file), or take the header's word (fastest; a clip that holds fewer frames is found at its decode)."""
    cache: Literal["none", "latents", "auto"] = "none"
    """`latents`: encode every clip once before step 1, in an order of its own, and train from the stored latents;
    `auto`: store each clip's latents when it is first trained. Both show windows and crops of epoch 0 in every epoch,
    and store the caption embeddings of a frozen text encoder as they are met."""
    cache_dir: str = ""
    """Folder of the cache; empty: `cache/` in the run folder. Runs may share a folder, since entries are named by their
    content; a folder that was filled with another VAE, text encoder or decoder is refused."""
    cache_text_gb: float = Field(50.0, ge=0)
    """Most GB of caption embeddings in the cache; when it is full, further captions are encoded each time they come."""
    latents: Literal["mode", "sample"] = "mode"
    """Train on the mode of the VAE's posterior, or on a sample that is drawn anew in each epoch, keyed by seed, epoch
    and clip. With `sample`, caches and encoded shards hold mean and log-variance."""

    stored_latents: Literal["use", "ignore"] = "use"
    """Latents in the shards. `use`: train from those that have the shape of the sample's bucket, and refuse those of
    another VAE; `ignore`: decode the clips, and drop samples without a clip."""
    stored_text: Literal["use", "ignore"] = "use"
    """Caption embeddings in the shards. `use`: train from them, and refuse those of another text encoder and any where
    the encoder is trained; `ignore`: encode the captions in the run."""

    @field_validator("alpha_background")
    @classmethod
    def _a_colour(cls, alpha_background: str) -> str:
        # Costs a tenth of a second, which commands without data would pay too.
        from PIL import ImageColor

        try:
            ImageColor.getrgb(alpha_background)
        except ValueError as error:
            raise ValueError(
                f"data.alpha_background={alpha_background} is no colour; give a name such as black, or #rrggbb"
            ) from error
        return alpha_background

    @field_validator("caption_weights")
    @classmethod
    def _some_weight(cls, weights: dict[str, float]) -> dict[str, float]:
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(
                    f"data.caption_weights.{name}={weight} is no weight; give it a number of at least 0"
                )
        if weights and not any(weights.values()):
            raise ValueError(
                f"data.caption_weights={weights} gives every caption the weight 0; give one a weight above 0, "
                "or leave it empty for the main caption"
            )
        return weights

    @model_validator(mode="after")
    def _source_named(self) -> "DataConfig":
        if not self.source and not self.sources:
            raise ValueError(
                "data.source is empty; name a folder of clips or shards or a table, for example data.source=my_clips"
            )
        if self.source and self.sources:
            raise ValueError(
                f"data.source={self.source} and data.sources are both given; set data.source='' to train on several "
                "sources, or leave data.sources out"
            )
        names = [source.name for source in self.sources]
        for source in self.sources:
            if not source.name or not source.source or names.count(source.name) > 1:
                raise ValueError(
                    f"data.sources: name={source.name!r} source={source.source!r}; every source needs a name of its "
                    "own and a place"
                )
        if self.sources and self.captions:
            raise ValueError(
                f"data.captions={self.captions} belongs to one source; give it as captions: in data.sources"
            )
        return self

    @model_validator(mode="after")
    def _mix_is_whole(self) -> "DataConfig":
        names = {source.name for source in self.sources}
        steps = [mix.from_step for mix in self.mix]
        if self.mix and len(names) < 2:
            raise ValueError("data.mix needs several sources to mix; give them as data.sources")
        if self.mix and (steps[0] != 0 or sorted(set(steps)) != steps):
            raise ValueError(
                f"data.mix has from_step {steps}; the first is 0 and each is later than the one before"
            )
        for number, mix in enumerate(self.mix):
            _check_mix(mix, f"data.mix[{number}]", names)
        resting = [
            name
            for name in sorted(names)
            if self.mix and not any(mix.meets(name) for mix in self.mix)
        ]
        if resting:
            raise ValueError(
                f"data.mix never meets the source {resting[0]!r}; give it a weight, or leave it out of data.sources"
            )
        return self

    @model_validator(mode="after")
    def _sizes_have_one_source(self) -> "DataConfig":
        if self.micro_batch == "table" and not self.micro_batch_table:
            raise ValueError(
                "data.micro_batch=table needs data.micro_batch_table, such as "
                "'data.micro_batch_table={65x256x448: 2}'; give it, or set data.micro_batch=auto"
            )
        if self.micro_batch != "table" and self.micro_batch_table:
            raise ValueError(
                f"data.micro_batch_table is given but data.micro_batch={self.micro_batch} does not read it; "
                "set data.micro_batch=table, or drop the table with ~data.micro_batch_table"
            )
        return self

    @model_validator(mode="after")
    def _blocks_fit(self) -> "DataConfig":
        if self.disk_cache_dir and self.disk_cache_gb * 1000 < 8 * self.read_block_mb:
            raise ValueError(
                f"data.disk_cache_gb={self.disk_cache_gb:g} holds fewer than 8 blocks of data.read_block_mb="
                f"{self.read_block_mb:g}; raise the one or lower the other"
            )
        return self


def _check_mix(mix: MixConfig, key: str, names: set[str]) -> None:
    if bool(mix.weights) == bool(mix.repeats):
        raise ValueError(f"{key} needs either weights or repeats, one of the two")
    for name, value in {**mix.weights, **mix.repeats}.items():
        if name not in names:
            raise ValueError(
                f"{key} names {name!r}, but data.sources are {', '.join(sorted(names))}"
            )
        if not 0 <= value < math.inf:
            raise ValueError(f"{key} gives {name!r} {value}; 0 or more is needed")
    if not any(mix.meets(name) for name in names):
        raise ValueError(f"{key} lets every source rest; give one a weight above 0")


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
    """Frames per second at which clips are sampled; a slower clip keeps its own rate. The model gets the real one."""
    max_upscale: float = Field(1.25, ge=1)
    """Largest factor by which a clip may be enlarged to fit a bucket."""
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
