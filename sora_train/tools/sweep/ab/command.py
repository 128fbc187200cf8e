"""`sora ab`: its flags, and the comparison."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from sora_train.errors import UserError


def ab(
    a: Annotated[str, typer.Argument(metavar="A", help="A YAML file, or overrides in quotes.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same for the other side.")],
    shared: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides for both.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of both runs.")] = Path(
        "runs/ab"
    ),
    confidence: Annotated[float, typer.Option(help="Of the interval, over all looks.")] = 0.95,
) -> int:
    """Train two configurations on the same clips with the same noise, until it is clear which is better.

    Both runs end as soon as the interval of the difference of their training losses leaves out 0. It may be looked at
    at any time: the confidence holds over all looks together. The same command goes on with what was interrupted.

    \b
    sora ab a.yaml b.yaml
    sora ab optim.lr=1e-3 optim.lr=2e-3 experiment=quickstart --out runs/rates
    sora ab "model=tiny" "model=tiny optim=muon" experiment=quickstart train.steps=800
    """
    if not 0.5 <= confidence < 1:
        raise UserError(
            f"--confidence {confidence:g} must be from 0.5 to below 1, for example 0.95"
        )
    from sora_train.tools.sweep.ab.race import difference, train_pair
    from sora_train.tools.sweep.ab.report import write_report
    from sora_train.tools.sweep.ab.sides import pair_of

    pair = pair_of((a, b), shared or [], out)
    found = difference(pair, confidence)
    code = 0 if found.interval.sure else train_pair(pair, confidence)
    if code:
        return code
    print(write_report(pair, difference(pair, confidence)))
    print(f"next: sora watch {shlex.quote(str(out))}")
    return 0
