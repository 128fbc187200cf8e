"""`sora bench all`: one table of what a run does beside the peers that do it, each pair in one run and in turns.

A row is a ratio: how many times as fast as its peer ours is. Its target stands beside it, and where one is known the
floor: the ratio that could be reached if nothing but the arithmetic, or the bare decoder, took time. The table is
written again after each part, and a part that fails is a row that says so.
"""

import argparse
import gc
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from benchmarks import data as data_bench
from benchmarks import model as model_bench
from benchmarks.ckpt import a_state, savers_in
from benchmarks.ddp_loop import DdpLoop
from benchmarks.model import take_turns
from sora_train.base.progress import Progress
from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.device.measuring import Measured, Result, Stats
from sora_train.errors import SoraError
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.transformer.dit import VideoDiT
from sora_train.models.transformer.wan_layout import wan_arguments
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.objectives.spec import build_spec
from sora_train.runtime import world as distributed
from sora_train.sampling.pipeline import sample_latents
from sora_train.training.trainer import Trainer

DEFAULT_OUT = Path("benchmarks/results")
BUCKET = "[{name: 128px, pixels: 16384, frames: [9], aspect_ratios: ['1:1']}]"


@dataclass(frozen=True)
class Row:
    """One comparison: `ratio` is how many times as fast as the peer, above 1 is faster."""

    what: str
    peer: str
    ours: str
    theirs: str
    ratio: Stats
    target: float
    floor: float | None = None
    note: str = ""

    @property
    def met(self) -> bool:
        return self.ratio.median >= self.target


@dataclass(frozen=True)
class Effort:
    """Turns of each contestant, the tokens of a clip, MiB of a state, seconds for the loader."""

    repeats: int = 9
    tokens: tuple[int, ...] = (1024, 4096)
    mib: int = 512
    seconds: float = 60.0


QUICK = Effort(repeats=7, tokens=(1024, 4096), mib=192, seconds=25.0)
TOY = Effort(repeats=1, tokens=(64,), mib=8, seconds=1.0)
"""For tests: every part runs, no number means anything."""


def main(arguments: Sequence[str]) -> int:
    """Run `[--quick] [--only PART] [--out DIR]`, print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="sora bench all", allow_abbrev=False)
    parser.add_argument(
        "--quick", action="store_true", help="in less than five minutes on two cores"
    )
    parser.add_argument("--toy", action="store_true", help="seconds; the numbers mean nothing")
    parser.add_argument("--only", choices=tuple(PARTS), help="one part")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of all.json, all.md")
    options = parser.parse_args(list(arguments))
    effort = TOY if options.toy else QUICK if options.quick else Effort()
    parts = {name: PARTS[name] for name in ([options.only] if options.only else PARTS)}
    failures, path = run(effort, parts, options.out)
    print(f"\n{path.with_suffix('.md').read_text()}\nwrote {path} and {path.with_suffix('.md')}")
    return 1 if failures else 0


def run(
    effort: Effort, parts: dict[str, Callable[[Effort], list[Row]]], out: Path
) -> tuple[dict[str, str], Path]:
    """Why parts failed, and the file with the rows of the others; written after each part."""
    rows: list[Row] = []
    failures: dict[str, str] = {}
    with Progress(len(parts), "parts", line_seconds=0.0) as progress:
        for number, (name, part) in enumerate(parts.items(), 1):
            try:
                rows += part(effort)
            # A part that cannot run, for want of a package or a source, does not take the others with it.
            except (SoraError, ImportError, OSError, RuntimeError, ValueError) as error:
                failures[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            gc.collect()
            path = result_of(rows, failures).write(out)
            progress.update(number, part=name)
    return failures, path


@dataclass
class Overview(Result):
    """A result whose page is the table."""

    rows: list[Row] = field(default_factory=list)

    def to_markdown(self) -> str:
        lines = [
            "# Ours beside peers",
            "",
            "| what | ours | peer | peer's | ratio | p10-p90 | floor | target | |",
            "|---|--:|---|--:|--:|--:|--:|--:|---|",
        ]
        for row in self.rows:
            ratio, floor = row.ratio, "" if row.floor is None else f"{row.floor:.2f}"
            lines.append(
                f"| {row.what} | {row.ours} | {row.peer} | {row.theirs} | **{ratio.median:.2f}** | "
                f"{ratio.p10:.2f}-{ratio.p90:.2f} | {floor} | {row.target:g} | "
                f"{'met' if row.met else 'not met'} |"
            )
        notes = [f"{row.what}: {row.note}." for row in self.rows if row.note]
        about = {**self.facts, **self.machine, "commit": self.commit, "written": self.written}
        said = ", ".join(f"{key} {value}" for key, value in about.items())
        return "\n".join([*lines, "", *notes, "", said, "", "```", self.command, "```", ""])


def result_of(rows: Sequence[Row], failures: dict[str, str]) -> Overview:
    measured = {f"{row.what} / {row.peer}": Measured(row.ratio, "times", "{:.2f}") for row in rows}
    facts: dict[str, str | int | float | None] = {
        "threads": torch.get_num_threads(),
        "load": model_bench.first_load(),
        **{f"{name} was not measured:": why for name, why in failures.items()},
    }
    return Overview("all", measured, facts, rows=list(rows))


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> Stats:
    """Their seconds over ours, turn by turn: neighbours in time, so a busy machine slows both."""
    return Stats.of([b / a for a, b in zip(ours, theirs, strict=True)])


def seconds(values: Sequence[float]) -> str:
    return f"{Stats.of(values).median:.3g} s"


# --- the parts ---


def transformer(effort: Effort) -> list[Row]:
    """Forward and backward beside diffusers' model; see model.py for what is the same and what is not."""
    rows = []
    for tokens in effort.tokens:
        layers = 8 if tokens <= 1024 else 2
        cfg = model_bench.model_of([]).model_copy(update={"num_layers": layers})
        for dtype in ("float32", "bfloat16"):
            request = model_bench.ModelBenchRequest(
                cfg, tokens=tokens, dtypes=(dtype,), repeats=effort.repeats
            )
            device = torch.device("cpu")
            kind = getattr(torch, dtype)
            batch = model_bench.batch_of(request, kind, device)
            steps = model_bench.contestants(request, kind, "eager", device, batch)
            taken = take_turns(steps, 1, effort.repeats)
            target = {"float32": 1.0 if tokens > 1024 else 1.1, "bfloat16": 1.15}[dtype]
            rows.append(
                Row(
                    f"transformer, {tokens:,} tokens, {dtype}",
                    "diffusers",
                    seconds(taken["ours"]),
                    seconds(taken["diffusers"]),
                    ratio_of(taken["ours"], taken["diffusers"]),
                    target,
                    ratio_of(taken[model_bench.FLOOR], taken["diffusers"]).median,
                )
            )
    return rows


def sampling(effort: Effort) -> list[Row]:
    """Guided sampling of latents beside diffusers' pipeline: the same weights, noise, steps and embeddings."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    cfg: Config = compose(SAMPLING).config
    ours = TextToVideo(cfg.model, cfg.text, seed=0).eval()
    spec = build_spec(cfg, VideoVAE.from_config(cfg.vae), ours)
    assert spec is not None
    theirs = WanTransformer3DModel(**wan_arguments(cfg.model))
    theirs.load_state_dict(ours.transformer.state_dict())
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=theirs.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=spec.shift),
    )
    pipeline.set_progress_bar_config(disable=True)
    side = 16 if max(effort.tokens) <= 64 else 32
    noise = torch.randn(1, 16, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embedded, empty = (ours.tokenize([prompt])[0] for prompt in ("a cat", ""))

    def peer() -> None:
        pipeline(
            prompt_embeds=embedded, negative_prompt_embeds=empty, height=8 * side, width=8 * side,
            num_frames=9, num_inference_steps=spec.num_steps, guidance_scale=spec.guidance_scale, latents=noise,
            output_type="latent",
        )  # fmt: skip

    taken = take_turns(
        {"ours": lambda: _nothing(sample_latents(ours, spec, ["a cat"], noise, 8.0)), "peer": peer},
        1,
        effort.repeats,
    )
    return [
        Row(
            f"sampling, {spec.num_steps} guided steps",
            "diffusers' pipeline",
            seconds(taken["ours"]),
            seconds(taken["peer"]),
            ratio_of(taken["ours"], taken["peer"]),
            1.0,
        )
    ]


def loader(effort: Effort) -> list[Row]:
    """Clips delivered beside the bare decoder and plain webdataset; see data.py."""
    clips = 200 if effort.seconds >= 20 else 24
    with tempfile.TemporaryDirectory(prefix="sora_bench_") as folder:
        overrides = [
            f"data.shapes_clips={clips}",
            "data.shapes_val_clips=4",
            f"run.dir={folder}/run",
        ]
        wanted = data_bench.Effort(
            repeats=min(5, effort.repeats), soak=0, seconds=effort.seconds, clips=clips
        )
        found = json.loads(data_bench.run(overrides, wanted, out=Path(folder)).read_text())
    measured = found["measured"]
    rows = []
    for peer, target, floor in (("bare decoder", 0.9, 1.0), ("webdataset", 1.0, None)):
        if peer not in measured:
            continue
        mine, theirs = measured["loader"], measured[peer]
        share = measured["loader / bare decoder"]
        if peer == "bare decoder":
            ratio = Stats(share["median"] / 100, share["p10"] / 100, share["p90"] / 100, share["n"])
        else:
            ratio = Stats(
                mine["median"] / theirs["median"],
                mine["p10"] / theirs["p90"],
                mine["p90"] / theirs["p10"],
                mine["n"],
            )
        first, second = (f"{each['median']:,.0f} clips/s" for each in (mine, theirs))
        rows.append(Row("loader, clips of 4 kB", peer, first, second, ratio, target, floor))
    return rows


def checkpoint(effort: Effort) -> list[Row]:
    """How long training waits for a save, beside torch.save and a synchronous distributed checkpoint."""
    with process_group(), tempfile.TemporaryDirectory(dir=".", prefix="bench-all-") as place:
        folder = Path(place)
        tensors = a_state(effort.mib, torch.device("cpu"))
        world = distributed.World(0, 1, 0, 1, torch.device("cpu"))
        savers = savers_in(folder, world)
        savers["async"].prepare(tensors)
        numbers = iter(range(1, 10_000))
        taken = take_turns(
            {
                "stall": lambda: savers["async"].save(next(numbers), tensors, {}),
                "rest": savers["async"].wait,
                "at once": lambda: savers["sync"].save(next(numbers), tensors, {}),
                "torch.save": lambda: torch_save(tensors, folder / "plain.pt"),
                "DCP, synchronous": lambda: _nothing(
                    dcp.save(dict(tensors), checkpoint_id=folder / "dcp", no_dist=True)
                ),
            },
            1,
            max(1, effort.repeats // 2),
        )
    rows = []
    for peer, target in (("torch.save", 10.0), ("DCP, synchronous", 10.0)):
        ratio = ratio_of(taken["stall"], taken[peer])
        rows.append(
            Row(f"training waits for a save of {effort.mib} MiB", peer,
                seconds(taken["stall"]), seconds(taken[peer]), ratio, target)
        )  # fmt: skip
    rows.append(
        Row(f"a save at once of {effort.mib} MiB, digests and commit included", "DCP, synchronous",
            seconds(taken["at once"]), seconds(taken["DCP, synchronous"]),
            ratio_of(taken["at once"], taken["DCP, synchronous"]), 0.5,
            note="DCP computes no digests and does not wait for the disk")
    )  # fmt: skip
    return rows


def loop(effort: Effort) -> list[Row]:
    """A step of the Trainer beside one of a loop of fifty lines around the same model; see ddp_loop.py."""
    with tempfile.TemporaryDirectory(prefix="sora_bench_") as folder:
        trainer = Trainer(compose(LOOP + [f"run.dir={folder}/run", "tracker=none"]).config)
        try:
            (entry, *_), cfg = trainer.data.micro_batches_at(0), trainer.cfg
            shape = trainer.vae.latent_shape(
                entry.bucket.frames, entry.bucket.height, entry.bucket.width
            )
            model = VideoDiT(cfg.model)
            model.init_weights(0)
            shapes: list[tuple[int, ...]] = [(len(entry.rows), *shape)] * cfg.train.micro_batches
            peer = DdpLoop(model, shapes, cfg.text.max_length, cfg.optim.lr)
            # The first epoch stores captions.
            taken = take_turns(
                {
                    "ours": lambda: _nothing(trainer.train_step()),
                    "peer": lambda: _nothing(peer.step()),
                },
                4,
                effort.repeats,
            )
        finally:
            trainer.close()
    tokens = math.prod(shape[1:]) // 4
    return [
        Row(
            f"a training step of {len(shapes)} x {len(entry.rows)} clips of {tokens} tokens",
            "DDP loop of 50 lines",
            seconds(taken["ours"]),
            seconds(taken["peer"]),
            ratio_of(taken["ours"], taken["peer"]),
            0.95,
            note="the loop reads no clips, masks, weighs, judges and records nothing",
        )
    ]


SAMPLING = [
    "experiment=parity_tiny", "text.trainable=false", "text.padding=wan", "model.num_layers=4",
    "model.num_heads=4", "model.head_dim=64", "model.ffn_dim=1024", "model.in_channels=16",
    "model.mask_channel=false", "model.fps_embed=false", "objective.num_steps=4",
    "objective.guidance_scale=5", "objective.solver=euler", "objective.shift=3", "tracker=none",
]  # fmt: skip

LOOP = [
    "experiment=parity_tiny", "optim=adamw", "text.trainable=false", "data.cache=latents",
    f"buckets.classes={BUCKET}", "buckets.max_upscale=16", "data.shapes_image_share=0",
    "objective.caption_dropout=0", "objective.conditioning={}", "model.num_layers=4",
    "model.num_heads=4", "model.head_dim=64", "model.ffn_dim=1024", "train.steps=1000",
    "checkpoint.every=0", "validation.every=0", "run.threads=0",
]  # fmt: skip

PARTS: dict[str, Callable[[Effort], list[Row]]] = {
    "transformer": transformer,
    "loop": loop,
    "sampling": sampling,
    "loader": loader,
    "checkpoint": checkpoint,
}


def torch_save(tensors: dict[str, Tensor], path: Path) -> None:
    """Until it lies on the disk, as the others do."""
    with path.open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def process_group() -> Iterator[None]:
    world = distributed.start("cpu", 0)
    try:
        yield
    finally:
        distributed.stop(world)


def _nothing(value: object) -> None:
    """A step whose result is not looked at."""
