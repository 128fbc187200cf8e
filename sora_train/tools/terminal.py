"""What the sub-commands of `sora` do once their arguments are read; each returns what it prints."""

import hashlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from sora_train.config.compose import parse_settings
from sora_train.config.sections.settings import ShardSettings, SourceSettings
from sora_train.errors import UserError

if TYPE_CHECKING:
    from sora_train.config import Config
    from sora_train.data.manifest import Manifest
    from sora_train.sampling.operations import Request


def sample_clips(
    *,
    ckpt: str,
    prompts: list[str],
    request: "Request",
    shape: tuple[tuple[int, int] | None, int | None, float | None],
    settings: dict[str, Any],
    how: dict[str, Any],
    out: Path,
    weights: str = "ema",
) -> list[Path]:
    """Sample every prompt from a checkpoint; returns the files written under `out`.

    Everything is checked, and the files of the request are read, before the model is loaded.

    Args:
        shape: size, frames and fps, None for the run's own.
        settings: of the sampler, and `how`: further arguments of `Model.sample`.
        weights: as `sora_train.load` takes them.
    """
    request.check()
    if not prompts:
        raise UserError('no prompt is given; add --prompt "..." or --prompts FILE')
    from sora_train.checkpoint.layout import split_step
    from sora_train.checkpoint.tensors import StoredTensors
    from sora_train.models.vae.autoencoder import read_geometry
    from sora_train.sampling.api import changed, fitting_shape, load, look
    from sora_train.sampling.operations import prepare

    run_dir, step = split_step(ckpt)
    looked = look(run_dir, step)
    StoredTensors(looked.found).prefix(weights)
    spec = changed(looked.spec, settings)
    geometry = read_geometry(looked.cfg.vae)
    wanted = fitting_shape(looked.cfg, geometry, looked.shape, *shape)
    prepared = prepare(request, wanted, geometry)
    about_given = {
        "--condition-noise": how["condition_noise"],
        "--condition-scale": settings["condition_scale"],
    }
    for flag, value in about_given.items():
        if value and prepared.kind == "t2v":
            raise UserError(
                f"{flag} {value:g} is about given frames, and --op {request.op} gives none; drop it"
            )
    if how["negative_prompt"] and spec.guidance_scale == 1:
        raise UserError(
            "--negative-prompt needs guidance, and guidance_scale is 1; raise --guidance-scale"
        )
    note = prepared.note(spec, request.op)
    if note:
        print(note, file=sys.stderr)
    model = load(str(run_dir), step=looked.found.step, weights=weights)
    clips = model.sample(prompts, prepared=prepared, **how, **settings)
    labels = [prompt for prompt in prompts for _ in range(how["num"])]
    return model.save(clips, labels, out, fps=prepared.shape.fps, seed=how["seed"])


def prep_shards(overrides: list[str]) -> str:
    """Write shards from clips, and count what went in."""
    settings = parse_settings(ShardSettings, overrides)
    from data_prep.shards import write_shards

    with counting("reading clips") as advance:
        manifest = write_shards(
            settings.input,
            settings.output,
            captions=settings.captions,
            max_shard_bytes=settings.max_shard_mb * 10**6,
            allow_empty_captions=settings.allow_empty_captions,
            workers=settings.workers,
            progress=advance,
        )
    return f"{count(manifest)}\nnext: sora train experiment=real_tiny data.source={settings.output}"


def data_index(overrides: list[str]) -> str:
    """Counts of a source: usable clips, dropped ones by reason, and each dropped clip's own."""
    settings = parse_settings(SourceSettings, _quoted(overrides))
    from sora_train.data.index.shards import is_shards

    names_members = settings.model_fields_set & {"caption_keys", "video_key"}
    if (
        is_shards(settings.source)
        or settings.output
        or settings.part
        or settings.merge
        or names_members
    ):
        return _index_shards(settings)
    manifest = _open(settings)
    return count(manifest)


def _quoted(overrides: list[str]) -> list[str]:
    """Patterns of shards and caption keys as plain strings: a brace would begin a mapping to the reader of
    overrides, and an equals sign another override.
    """

    def plain(text: str) -> str:
        key, _, value = text.partition("=")
        if "'" in value or '"' in value:
            return text
        if key == "source":
            return f"source='{value}'"
        if key == "caption_keys" and "=" in value:
            places = value.removeprefix("[").removesuffix("]").split(",")
            quoted = ",".join(f"'{place.strip()}'" for place in places)
            return f"caption_keys=[{quoted}]"
        return text

    return [plain(text) for text in overrides]


def _index_shards(settings: SourceSettings) -> str:
    """Index shards by their names into `output`."""
    from sora_train.data.captions.texts import MAIN
    from sora_train.data.index.shards import HowToIndex, index_shards
    from sora_train.data.index.tars import MemberKeys, caption_name

    name = hashlib.sha256(settings.source.encode()).hexdigest()[:12]
    output = Path(settings.output or Path(settings.work_dir) / f"shards-{name}")
    videos = tuple(key for key in settings.video_key.lower().split(";") if key)
    how = HowToIndex(
        MemberKeys(videos, settings.caption_keys), settings.probe, settings.allow_empty_captions
    )
    with counting("indexing") as advance:
        manifest = index_shards(
            settings.source,
            output,
            how,
            workers=settings.workers,
            duplicate_keys=settings.duplicate_keys,
            part=settings.part,
            merge=settings.merge,
            progress=advance,
        )
    if manifest is None:
        return (
            f"part {settings.part} is done, its rows lie in {output}; when all parts are: the same command with "
            "merge=true instead of part="
        )
    named = [name for name, _ in map(caption_name, settings.caption_keys) if name != MAIN]
    return f"{count(manifest, named)}\nnext: sora train experiment=real_tiny data.source={output}"


def data_show(overrides: list[str]) -> str:
    """A table of the clips of a source."""
    settings = parse_settings(SourceSettings, overrides)
    manifest = _open(settings)
    shown = range(min(len(manifest), settings.limit))
    rows = [
        (
            str(manifest.key[row]),
            str(manifest.kind[row]),
            str(manifest.frames[row]),
            f"{manifest.width[row]}x{manifest.height[row]}",
            f"{manifest.fps[row]:.5g}",
            str(manifest.drop_reason[row] or manifest.caption[row]),
        )
        for row in shown
    ]
    table = table_of(
        ("clip", "kind", "frames", "size", "fps", "caption, or why it is dropped"), rows
    )
    rest = len(manifest) - len(shown)
    return f"{table}\n{f'{rest} more; raise limit=' if rest else count(manifest)}"


def data_report(overrides: list[str], config_dir: Path | None) -> str:
    """Write the report of what a run would make of its clips into `out=DIR`."""
    from sora_train.config.compose import compose, split_yaml_file
    from sora_train.tools.data.report import account, write_data_report

    given = [text.removeprefix("out=") for text in overrides if text.startswith("out=")]
    rest = [text for text in overrides if not text.startswith("out=")]
    yaml_file, rest = split_yaml_file(rest)
    cfg: Config = compose(rest, config_dir=config_dir, yaml_file=yaml_file).config
    out = Path(given[-1] if given else f"{cfg.run.dir}/data_report").expanduser()
    plan, paths = write_data_report(cfg, out)
    return f"{account(plan)}\nwrote {', '.join(map(str, paths))}"


def data_trace(arguments: list[str], config_dir: Path | None) -> str:
    """Rows of the tape for `steps=A:B world=R`, printed or written to `out=FILE.jsonl`."""
    from sora_train.config.compose import compose, split_yaml_file
    from sora_train.tools.data.trace import TraceRequest, trace

    request, overrides = TraceRequest.parse(arguments)
    yaml_file, overrides = split_yaml_file(overrides)
    return trace(compose(overrides, config_dir=config_dir, yaml_file=yaml_file).config, request)


def data_encode(arguments: list[str], config_dir: Path | None) -> str:
    """Write shards of latents into `output=DIR`, and count what went in."""
    from sora_train.config.compose import compose, split_yaml_file
    from sora_train.tools.data.encode import EncodeRequest, encode

    request, overrides = EncodeRequest.parse(arguments)
    yaml_file, overrides = split_yaml_file(overrides)
    written = encode(compose(overrides, config_dir=config_dir, yaml_file=yaml_file).config, request)
    if not written:
        return (
            f"its share is done, part {request.part[0]} of {request.part[1]}, and lies in {request.output}; when all "
            "are: the same command with merge=true instead of part="
            if not request.writes
            else f"its share is done; the first rank writes {request.output}"
        )
    lines = [count(manifest) for manifest in written.values()]
    sources = {"train": "data.source", "val": "data.val_source"}
    given = [
        f"{sources[split]}={request.output / split}"
        for split in ("train", "val")
        if split in written
    ]
    return "\n".join([*lines, f"next: sora train with the same overrides and {' '.join(given)}"])


def data_verify(arguments: list[str], config_dir: Path | None) -> tuple[str, bool]:
    """What came of encoding a sample again, and whether all of it is as it is stored."""
    from sora_train.config.compose import compose, split_yaml_file
    from sora_train.tools.data.verify import VerifyRequest, verify

    request, overrides = VerifyRequest.parse(arguments)
    yaml_file, overrides = split_yaml_file(overrides)
    cfg: Config = compose(overrides, config_dir=config_dir, yaml_file=yaml_file).config
    verified = verify(cfg, request)
    lines = []
    if verified.made:
        lines.append(f"other settings there than now:\n{verified.made}")
    columns = ("what", "compared", "largest difference", "tolerance", "differ")
    rows = []
    for what in dict.fromkeys(one.what for one in verified.found):
        found = [one for one in verified.found if one.what == what]
        largest = max(found, key=lambda one: one.difference)
        wrong = sum(not one.same for one in found)
        rows.append(
            (what, str(len(found)), f"{largest.difference:.2e}", f"{largest.tolerance:.0e}", str(wrong))
        )  # fmt: skip
    lines.append(table_of(columns, sorted(rows)))
    clips = len({one.name for one in verified.found})
    lines.append(f"{clips} of {verified.stored} stored clips were encoded again")
    lines += [
        f"  {one.name}: {one.what} differs by {one.difference:.2e}{one.detail and f' ({one.detail})'}"
        for one in verified.wrong
    ]
    return "\n".join(lines), not verified.wrong


def ckpt_import(
    source: Path,
    out: Path,
    layout: str,
    size: str,
    frames: int,
    fps: float,
    mask_channel: bool,
    fps_embed: bool,
    base: Path | None,
) -> str:
    """Make a run folder of a pipeline's folder; returns the report."""
    _require_diffusers("--from", layout)
    from sora_train.sampling.pipeline import ClipShape
    from sora_train.tools.convert.from_diffusers import import_pipeline

    width, cross, height = size.partition("x")
    if not (cross and width.isdigit() and height.isdigit()):
        raise UserError(f"--size {size} is not width x height, such as 832x480")
    shape = ClipShape(frames, int(height), int(width), fps)
    return import_pipeline(
        source, out, shape, base=base, mask_channel=mask_channel, fps_embed=fps_embed
    )


def ckpt_export(
    run: str, out: Path, layout: str, weights: str, fps: float | None, max_shard_gb: float
) -> str:
    """Write a run as a pipeline's folder; returns what was done."""
    _require_diffusers("--to", layout)
    if max_shard_gb <= 0:
        raise UserError(f"--max-shard-gb {max_shard_gb:g} holds nothing; 5 is usual")
    from sora_train.checkpoint.layout import split_step
    from sora_train.tools.convert.to_diffusers import export_pipeline

    run_dir, step = split_step(run)
    max_shard_bytes = int(max_shard_gb * 1e9)
    return export_pipeline(
        run_dir, out, step=step, weights=weights, fps=fps, max_shard_bytes=max_shard_bytes
    )


def _require_diffusers(flag: str, layout: str) -> None:
    if layout != "diffusers":
        raise UserError(f"{flag} {layout} is not known; the layout there is: diffusers")


def bench_train(overrides: list[str]) -> int:
    """Run the training benchmark; returns the exit code."""
    from benchmarks.train import main

    return main(overrides)


def bench_data(overrides: list[str]) -> int:
    """Run the loader's benchmark; returns the exit code."""
    from benchmarks.data import main

    return main(overrides)


def bench_cost(overrides: list[str]) -> int:
    """Run the benchmark of the cost model; returns the exit code."""
    from sora_train.tools.plan.cost import main

    return main(overrides)


def bench_model(overrides: list[str]) -> int:
    """Run the transformer's benchmark; returns the exit code."""
    from benchmarks.model import main

    return main(overrides)


def bench_memory(overrides: list[str]) -> int:
    """Run the benchmark of the memory options; returns the exit code."""
    from benchmarks.memory import main

    return main(overrides)


def bench_ckpt(arguments: list[str]) -> int:
    """Run the benchmark of saving; returns the exit code."""
    from benchmarks.ckpt import main

    return main(arguments)


def bench_vae(overrides: list[str]) -> int:
    """Run the benchmark of the VAE; returns the exit code."""
    from benchmarks.vae import main

    return main(overrides)


def models(overrides: list[str], config_dir: Path | None) -> str:
    """A table of the shipped models, smallest first."""
    from sora_train.tools.plan.model_sizes import COLUMNS, rows

    return table_of(COLUMNS, [cells for _, cells in rows(overrides, config_dir)])


def write_report(run_dir: Path) -> str:
    """Write report.html of a run anew."""
    if not (run_dir / "metrics.jsonl").is_file():
        raise UserError(f"{run_dir} is no run folder: it has no metrics.jsonl")
    from sora_train.monitoring.report.report import write_report as write

    return f"wrote {write(run_dir)}"


def count(manifest: "Manifest", captions: Sequence[str] = ()) -> str:
    """`used + dropped(reason) = total` in words, and a line for each dropped clip up to twenty.

    Captions are counted by name where there are others than the main one, or `captions` names some.
    """
    from sora_train.data.captions.choice import caption_counts

    dropped = manifest.dropped()
    usable = len(manifest) - sum(dropped.values())
    lines = [
        f"{manifest.root}: {len(manifest)} clips = {usable} usable + {sum(dropped.values())} dropped"
    ]
    lines += [f"  {number} {reason}" for reason, number in sorted(dropped.items())]
    named = caption_counts(manifest)
    if len(named) > 1 or captions:
        said = ", ".join(f"{named[name]} {name}" for name in dict.fromkeys([*named, *captions]))
        lines.append(f"  captions: {said}")
    faulty = [row for row in range(len(manifest)) if manifest.drop_reason[row]]
    lines += [
        f"  {manifest.key[row]}: {manifest.drop_reason[row]}, {manifest.drop_detail[row]}"
        for row in faulty[:20]
    ]
    if len(faulty) > 20:
        lines.append(f"  and {len(faulty) - 20} more")
    return "\n".join(lines)


def _open(settings: SourceSettings) -> "Manifest":
    from sora_train.data.index.folder import open_source

    with counting("indexing") as advance:
        return open_source(
            settings.source,
            captions=settings.captions,
            work_dir=settings.work_dir,
            probe=settings.probe,
            workers=settings.workers,
            progress=advance,
            allow_empty_captions=settings.allow_empty_captions,
        )


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A `progress(done, total)` that shows a bar from its first call on."""
    from sora_train.base.progress import Progress

    with ExitStack() as stack:
        bars: list[Progress] = []

        def advance(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(Progress(total, what)))
            bars[0].update(done)

        yield advance


def table_of(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=140, markup=False, emoji=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
