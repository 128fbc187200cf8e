"""What `sora prep run`, `status` and `stages` do."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from data_prep import pipeline
from data_prep.engines.base import Engine
from data_prep.ledger import Unfinished
from data_prep.settings import PrepSettings, parse, stage_files
from data_prep.stage import Workspace, load_module
from sora_train.base.files import read_json
from sora_train.config.overrides import split_yaml_file
from sora_train.config.schema import describe, keys
from sora_train.data.manifest import FILE_NAME, Manifest
from sora_train.errors import UserError


def prepare(arguments: Sequence[str]) -> str:
    """Run a preparation; returns what came of it and the next command. Raises what `pipeline.run` does."""
    file, rest = split_yaml_file(list(arguments))
    values = _of_file(file)
    stages = pipeline.stages_of(stage_files(rest, values))
    settings = parse(rest, stages, values)
    with engine_of(settings) as engine:
        try:
            pipeline.run(stages, settings, engine, lambda line: print(line, flush=True))
        except Unfinished as error:
            return (
                f"part {settings.part} is done as far as it can be: {error.rows} rows of the stage {error.stage} are "
                "the other parts'; when they are done: the same command again, and at last without part="
            )
    out = shlex.quote(str(settings.output))
    if settings.until:
        return f"next: sora prep status {out}"
    manifest = Manifest.load(settings.folder / FILE_NAME)
    hours = float(manifest.duration.sum()) / 3600
    return (
        f"{len(manifest)} clips, {hours:.3g} h, lie in {settings.output}; what became of all of them tells "
        f"{settings.output}/report.html\nnext: sora train experiment=real_tiny {_source(settings.output)}"
    )


def engine_of(settings: PrepSettings) -> Engine:
    """The engine that a run's settings name."""
    if settings.engine == "ray":
        from data_prep.engines.ray import RayCluster

        return RayCluster(
            settings.folder, settings.address, settings.workers, settings.limits.memory_gb
        )
    from data_prep.engines.processes import Processes

    return Processes(settings.folder, settings.workers, settings.limits.memory_gb)


def status(out: Path) -> str:
    """How far the preparation in a folder has come. Raises UserError where there is none."""
    stored = read_json(out / "prep" / pipeline.SETTINGS_FILE)
    if stored is None:
        raise UserError(
            f"{out} holds no preparation; `sora prep run input=... output={out}` begins one"
        )
    stages = pipeline.stages_of(stored["stages"])
    settings = parse([], stages, {**stored, "output": str(out), "part": "", "until": ""})
    return "\n".join(
        pipeline.progress(stages, settings, Workspace(settings.folder, settings.input))
    )


def listed(arguments: Sequence[str]) -> str:
    """Every stage and setting in words."""
    stages = pipeline.stages_of(stage_files(list(arguments), {}))
    lines = ["sora prep run"]
    lines += _settings(PrepSettings, "")
    for stage in stages:
        lines += ["", f"{stage.name}: {_first_sentence(stage.module)}"]
        lines += _settings(stage.config, f"{stage.name}.")
    return "\n".join(lines)


def _settings(cls: type, prefix: str) -> list[str]:
    lines = []
    for key in keys(cls, prefix).values():
        about = " ".join((key.field.description or "").split())
        default = "" if key.field.is_required() else f" = {_shown(key.default)}"
        lines.append(f"  {key.name}{default}   ({describe(key.field.annotation)})\n      {about}")
    return lines


def _shown(value: object) -> str:
    return str(list(value)).replace(" ", "") if isinstance(value, tuple) else str(value)


def _first_sentence(module: str) -> str:
    text = load_module(module).__doc__ or ""
    return " ".join(text.split("\n\n")[0].split())


def _of_file(file: Path | None) -> dict[str, object]:
    if file is None:
        return {}
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(
            f"{file} holds no settings; write `key: value` lines, and a section for each stage"
        )
    return values


def _source(output: str) -> str:
    return shlex.quote(f"data.source={output}")
