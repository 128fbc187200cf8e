"""The work of `sora sample --seconds`: long videos, checked whole before the model is loaded."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sora_train.base.files import write_atomically
from sora_train.errors import UserError
from sora_train.runtime.world import World
from sora_train.sampling.long.asked import long_request
from sora_train.sampling.long.video import LongRequest, make_long
from sora_train.sampling.prompts.script import Script
from sora_train.sampling.ranks.team import Team
from sora_train.tools.sample import flags
from sora_train.tools.sample.work import Work, checked, loaded


def long_to_folder(asked: SimpleNamespace, world: World | None = None) -> list[Path]:
    """A long video of every prompt in `asked.out`; returns the files written, as the first process does.

    `world`: of several processes.
    """
    work = checked(asked, world.size if world else 1)
    request = request_of(asked, work)
    request.check()
    team = Team(world, work.layout, work.info.cfg.model) if world else None
    is_main = world is None or world.is_main
    for note in [*work.notes, *notes(work)] if is_main else []:
        print(note, file=sys.stderr)
    model = loaded(asked, work, team)
    for note in model.adapted.notes if is_main else []:
        print(note, file=sys.stderr)
    prompts = [prompt for prompt in work.prompts for _ in range(asked.num)]
    negatives = [one for one in work.negatives for _ in range(asked.num)]
    paths = make_long(
        model,
        [work.script or Script.of(prompt) for prompt in prompts],
        request,
        asked.out,
        seed=work.seed,
        negative_prompts=negatives,
        **work.settings,
    )
    if not is_main:
        return []
    rows_beside = [row for row in work.beside for _ in range(asked.num)]
    rows = [
        {"prompt": prompt, "file": path.name, "seed": work.seed, "seconds": asked.seconds}
        | beside
        | ({"prompts": _said(work.script)} if work.script else {})
        for prompt, path, beside in zip(prompts, paths, rows_beside, strict=True)
    ]
    write_atomically(asked.out / "prompts.json", json.dumps(rows, indent=1))
    return paths


def request_of(asked: SimpleNamespace, work: Work) -> LongRequest:
    """What the flags say. Raises UserError for flags that do not go together, and models that cannot."""
    if asked.op != "t2v":
        raise UserError(
            f"--seconds makes a video from prompts, and --op is {asked.op}; leave out one of the two"
        )
    return long_request(
        work.info,
        work.prepared.shape,
        asked.seconds,
        anchor_fps=asked.anchor_fps,
        smooth_fps=asked.smooth_fps or 0.0,
        refined_size=flags.size_of(asked.refine, "--refine"),
    )


def _said(script: Script) -> list[dict[str, Any]]:
    """The prompts of a script and when they begin."""
    return [{"at": cue.at, "prompt": cue.prompt} for cue in script.cues if cue.prompt]


def notes(work: Work) -> list[str]:
    """Sentences on what the run was not trained for: to continue, and to be given frames anywhere."""
    shares, found = dict(work.info.spec.conditioning), []
    given = work.script is not None and any(cue.frames is not None for cue in work.script.cues)
    if given and not shares.get("random"):
        found.append(
            "this run was not trained on frames given anywhere in a clip (objective.conditioning.random is 0), so what "
            "is made may not lead up to those of the storyboard"
        )
    if shares.get("extend") or shares.get("random"):
        return found
    return [
        *found,
        "this run was not trained to continue a video (objective.conditioning.extend is 0), so what moves may stop at "
        "the first window's end; experiment=quickstart_long shows how",
    ]
