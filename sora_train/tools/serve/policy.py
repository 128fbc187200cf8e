"""`sora serve policy`: whether a policy can be read, and what it does to prompts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sora_train.tools.terminal import JsonFile, command_group, table_of, write_json

if TYPE_CHECKING:
    from sora_train.serving.safety.measure import Row

policy_app = command_group("Look at the policy of `sora serve`.")


@policy_app.command()
def check(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE.yaml]", help="A policy; that of the package where none is given."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml", help="CATEGORY: {violating: [...], benign: [...]}: measures it."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Say what becomes of this one; several may be given.")
    ] = None,
    json: JsonFile = "",
) -> None:
    """Read a policy, and say what it does to prompts.

    \b
    sora serve policy check
    sora serve policy check policy.yaml --prompt "Two naked eyes"
    sora serve policy check policy.yaml --prompts tests/serve/prompts/dev.yaml
    """
    # Imported here, so that help is instant.
    from sora_train.serving.safety.measure import measure, read_labelled
    from sora_train.serving.safety.policy import Policy
    from sora_train.serving.safety.policy_file import SHIPPED, read_policy

    path = file or SHIPPED
    policy, rows = Policy.read(path), []
    if json != "-":
        print(f"{path}: {', '.join(read_policy(path).categories)}")
        for text in prompt or ():
            decision = policy.judge_prompt(text)
            said = (
                decision.prompt
                if decision.allowed
                else f"blocked ({decision.category}): {decision.reason}"
            )
            print(
                f"{text!r} -> {said}"
                + (f" [{'; '.join(decision.rules)}]" if decision.rules else "")
            )
    if prompts is not None:
        rows = measure(policy, read_labelled(prompts))
        if json != "-":
            _show(rows)
    write_json([vars(row) for row in rows], json)


def _show(rows: "list[Row]") -> None:
    columns = ("category", "violating", "benign", "precision", "recall", "accuracy at input")
    shown = [
        (row.category, str(row.violating), str(row.benign))
        + tuple(f"{share:.0%}" for share in (row.precision, row.recall, row.accuracy_at_input))
        for row in rows
    ]
    violating, benign = sum(row.violating for row in rows), sum(row.benign for row in rows)
    missed = sum(len(row.missed) for row in rows)
    mistaken = len({prompt for row in rows for prompt in row.mistaken})
    named = sum(row.named for row in rows)
    shares = (
        1 - mistaken / max(1, violating - missed + mistaken),
        named / violating,
        1 - missed / violating,
    )
    shown.append(("all", str(violating), str(benign), *(f"{share:.0%}" for share in shares)))
    print(table_of(columns, shown))
