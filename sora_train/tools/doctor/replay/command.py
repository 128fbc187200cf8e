"""`sora replay`: its flags and help."""

from pathlib import Path
from typing import Annotated

import typer

from sora_train.tools.terminal import ProjectFile, Run


def replay(
    run_dir: Run,
    step: Annotated[int, typer.Option(help="The step, as metrics.jsonl counts; the first is 1.")],
    rank: Annotated[int | None, typer.Option(help="Only what this rank trained.")] = None,
    of: Annotated[
        int | None, typer.Option(help="Ranks it is dealt out over, if not its own.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default: RUN/replay/step-N.")] = None,
    no_loss: Annotated[
        bool, typer.Option("--no-loss", help="Without the model: clips and draws alone.")
    ] = False,
    checkpoint: Annotated[
        int | None, typer.Option(help="Weights of this step; 0: those the run began with.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    project: ProjectFile = None,
) -> None:
    """Rebuild a step on one machine: its clips, captions, noise levels, conditioning and the loss of each clip.

    Writes a contact sheet and replay.json; losses are those under the newest checkpoint before the step.

    \b
    sora replay runs/mine --step 1200
    sora replay runs/mine --step 1200 --rank 3
    sora replay runs/mine --step 1200 --no-loss --out look
    """
    from sora_train.tools.doctor.replay.replay import ReplayRequest
    from sora_train.tools.doctor.replay.replay import replay as replay_step
    from sora_train.training.recipe import Recipe, load_recipe
    from sora_train.training.trainer import Trainer

    recipe = load_recipe(project) if project else Recipe()
    request = ReplayRequest(run_dir, step, rank, of, out, not no_loss, checkpoint, device)
    print(replay_step(request, lambda run: Trainer.beside(run, recipe), recipe.config))
