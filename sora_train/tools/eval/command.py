"""`sora eval`: its flags and help."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sora_train.base.text import NotText, lines_of, read_text, require_text
from sora_train.errors import UserError
from sora_train.tools.terminal import ProjectFile, table_of

if TYPE_CHECKING:
    from sora_train.tools.eval.judge import Options
    from sora_train.training.recipe import Recipe

VBENCH = "vbench"

Targets = Annotated[
    list[str],
    typer.Argument(metavar="RUN[@STEP]|FOLDER ...", help="What is judged; two are compared."),
]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder of clips, numbers and page; else in the run, of several ./eval."),
]
Prompts = Annotated[Path | None, typer.Option(help="A text file with one prompt a line.")]
Num = Annotated[int, typer.Option(min=1, help="Prompts, or clips of a folder.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise; the same for all that are compared.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Solver steps; those of the run else.")]
GuidanceScale = Annotated[float | None, typer.Option(min=1, help="1 switches guidance off.")]
Frames = Annotated[int | None, typer.Option(min=1, help="Frames of a clip; as in training else.")]
Ema = Annotated[str, typer.Option("--ema", metavar="TAG", help="Another average; or live.")]
Tiers = Annotated[str, typer.Option(help="a: no networks; ab: those of wheels too.")]
Reference = Annotated[
    Path | None, typer.Option(help="A folder of real clips; else those that the run held out.")
]
I3d = Annotated[str, typer.Option("--i3d", metavar="FILE", help="i3d_torchscript.pt: FVD.")]
Vjepa = Annotated[str, typer.Option(metavar="FOLDER", help="A V-JEPA 2: JEDi's distance.")]
Clip = Annotated[str, typer.Option(metavar="FOLDER", help="A CLIP model: CLIP score.")]
Aesthetic = Annotated[str, typer.Option(metavar="FILE", help="LAION's head on that CLIP.")]
Python = Annotated[
    Path | None, typer.Option(help="eval vbench: the interpreter that has VBench installed.")
]
Dimension = Annotated[
    list[str] | None, typer.Option(help="eval vbench: one of its dimensions; all six else.")
]


def evaluate(
    targets: Targets,
    out: Out = None,
    prompts: Prompts = None,
    num: Num = 16,
    seed: Seed = 0,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    frames: Frames = None,
    ema: Ema = "ema",
    tiers: Tiers = "ab",
    reference: Reference = None,
    i3d: I3d = "",
    vjepa: Vjepa = "",
    clip: Clip = "",
    aesthetic: Aesthetic = "",
    project: ProjectFile = None,
    python: Python = None,
    dimension: Dimension = None,
) -> None:
    """Judge a run, or a folder of clips, in numbers, with the clips behind each.

    A run is sampled on fixed prompts with fixed noise, so two runs are compared clip by clip, with an interval.

    \b
    sora eval runs/quickstart
    sora eval samples --tiers a
    sora eval runs/a runs/b --prompts prompts.txt
    sora eval RUN --i3d i3d_torchscript.pt --reference real_clips
    sora eval vbench samples --python ~/vbench/bin/python
    """
    if targets[0] == VBENCH:
        _vbench(targets[1:], python, dimension, out)
        return
    if python or dimension:
        raise UserError("--python and --dimension belong to `sora eval vbench FOLDER`; drop them")
    if set(tiers) - set("ab") or "a" not in tiers:
        raise UserError(f"--tiers is '{tiers}'; write a or ab, and give tier c's weights by path")
    if len(targets) > 2:
        raise UserError(f"{len(targets)} targets are given; judge one, or compare two")
    from sora_train.evaluation.measures import Weights, check
    from sora_train.tools.eval.judge import Options

    weights = Weights(clip, aesthetic, i3d, vjepa)
    check(weights)
    options = Options(
        prompts=prompt_lines(prompts),
        num=num,
        seed=seed,
        frames=frames,
        settings={"steps": steps, "guidance_scale": guidance_scale},
        weights=ema,
        recipe=_recipe(project),
        tiers=tiers,
        given=weights,
        reference=reference,
    )
    _judge(targets, options, out)


def _judge(targets: list[str], options: "Options", out: Path | None) -> None:
    from sora_train.tools.eval import compare, page, results
    from sora_train.tools.eval.judge import evaluate as evaluated

    together = (out or Path("eval")) if len(targets) > 1 else None
    found = []
    for number, target in enumerate(targets, 1):
        place = out if together is None else together / str(number)
        one = evaluated(target, options, place)
        heads, rows = page.means_table(one, intervals=False)
        print(f"{one.name}\n{table_of(tuple(heads), [tuple(row) for row in rows])}")
        print(*one.notes, sep="\n", end="\n" if one.notes else "")
        results.write(one)
        print(page.write_page(one))
        found.append(one)
    if together is None:
        print(f"next: sora eval {shlex.quote(targets[0])} OTHER_RUN  (compares the two)")
        return
    first, second = found
    pairs = compare.compared(first, second)
    heads, rows = page.compared_table(pairs)
    print(f"1: {first.name}\n2: {second.name}")
    print(table_of(tuple(heads), [tuple(row) for row in rows]))
    compare.write(pairs, first, second, together / "comparison.json")
    page.write_comparison(pairs, first, second, together / "comparison.html")
    print(together / "comparison.html")


def _vbench(
    rest: list[str], python: Path | None, dimensions: list[str] | None, out: Path | None
) -> None:
    from sora_train.tools.eval.vbench import DIMENSIONS, vbench

    if len(rest) != 1 or python is None:
        raise UserError(
            "`sora eval vbench` takes a folder of clips and --python, the interpreter of VBench's own environment"
        )
    clips = Path(rest[0])
    where = (out or clips) / "vbench.json"
    scores = vbench(clips, python.expanduser(), dimensions or DIMENSIONS, where)
    print(table_of(("VBench", "score"), [(name, f"{value:.4f}") for name, value in scores.items()]))
    print(where)


def prompt_lines(path: Path | None) -> list[str]:
    """The prompts of a text file, one a line."""
    if path is None:
        return []
    try:
        text = read_text(path)
    except (OSError, NotText) as error:
        raise UserError(f"--prompts {path} cannot be read as text: {error}") from None
    lines = [require_text(line.strip(), "--prompts") for line in lines_of(text) if line.strip()]
    if not lines:
        raise UserError(f"--prompts {path} holds no prompts; write one a line")
    return lines


def _recipe(project: Path | None) -> "Recipe | None":
    if project is None:
        return None
    from sora_train.training.recipe import load_recipe

    return load_recipe(project)
