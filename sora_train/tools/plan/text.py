"""The plan in the terminal: at most 100 columns, each table with a line that says how to read it."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from sora_train.tools.plan.time.cluster import GIB

Values = dict[str, Any]
WIDTH = 100


def show(plan: Values, console: Console) -> None:
    """Print the plan of `plan_run`."""
    cluster = plan["cluster"]
    console.print(
        f"[bold]{plan['name']}[/] on {cluster['name']}: {cluster['nodes']} node(s), "
        f"{cluster['memory_gib']:g} GiB and {cluster['tflops']:g} TFLOP/s (bf16, dense) a GPU, "
        f"${cluster['price']:g} an hour",
        highlight=False,
    )
    console.print(f"parameters that are trained: {plan['parameters']:,}", highlight=False)
    for stage in plan["stages"]:
        _stage(stage, plan, console)
    console.print()
    console.print(_total(plan))
    for note in plan["notes"]:
        console.print(f"assumed: {note}", style="dim", highlight=False)
    console.print(
        "all assumptions: docs/plan.md; set them by plan.KEY=..., the machine's by cluster.KEY=...",
        style="dim",
    )


def _stage(stage: Values, plan: Values, console: Console) -> None:
    step = stage["step"]
    console.rule(f"{stage['name']}: {stage['steps']:,} steps", align="left")
    facts = _facts()
    facts.add_row("layout", f"{stage['layout']}; memory options: {stage['options']}")
    facts.add_row(
        "a step",
        f"{step['seconds']:.2f} s, MFU {percent(step['mfu'])}, {step['tokens_per_second']:,.0f} tokens/s; "
        f"{stage['micro_batches']} micro-batches ({stage['slots']} a rank), {step['clips']:,.0f} clips, "
        f"{step['tokens']:,.0f} tokens",
    )
    facts.add_row("its time", ", ".join(f"{name} {percent(value / step['seconds'])}" for name, value in
                                        sorted(step["parts"].items(), key=lambda p: -p[1])
                                        if value / step["seconds"] >= 0.005))  # fmt: skip
    facts.add_row("operations", f"{step['tflop']:,.0f} TFLOP of the model, attention counted; "
                                f"{step['recomputed_tflop']:,.0f} more computed again")  # fmt: skip
    facts.add_row("memory", _memory(stage["memory"]))
    facts.add_row("sent", _sent(stage["communication"]))
    facts.add_row("imbalance", f"{percent(step['imbalance'])} of a row of micro-batches is waiting")
    facts.add_row("saves", _saves(stage["saves"]))
    facts.add_row(
        "in all", f"{stage['hours']:,.1f} h, {stage['gpu_hours']:,.0f} GPU-hours, ${stage['cost']:,.0f}"
    )  # fmt: skip
    console.print(facts)
    console.print(_bucket_table(stage))
    console.print(_candidate_table(stage, plan))
    if stage["refused"]:
        console.print("Not these:", style="bold")
        for no in stage["refused"]:
            console.print(f"  {no['name']}: {no['reason']}", highlight=False)
    console.print("To paste:", style="bold")
    for line in pasted(stage["overrides"]):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def pasted(overrides: list[str]) -> list[str]:
    """The overrides in lines of at most 96 columns, which a shell joins."""
    lines, line = [], ""
    for text in [f"'{each}'" if "[" in each else each for each in overrides]:
        if line and len(line) + len(text) > WIDTH - 8:
            lines.append(f"{line} \\")
            line = ""
        line = f"{line} {text}" if line else text
    return [*lines, line]


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"


def _facts() -> Table:
    table = Table(show_header=False, box=None, padding=(0, 1, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _memory(memory: Values) -> str:
    """The peak of one rank and its parts."""
    parts = [
        (name, memory.get(name, 0)) for name in
        ("weights", "gradients", "optimizer", "ema", "activations", "buffers", "encoders")
    ]  # fmt: skip
    told = ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts if value)
    return f"{memory['peak'] / GIB:.1f} GiB a rank ({memory['when']}){': ' if told else ''}{told}"


def _sent(sent: Values) -> str:
    if not sent["gb"]:
        return "nothing"
    told = ", ".join(f"{kind} {value:,.1f} GB" for kind, value in sent["gb"].items())
    return (
        f"by a rank in a step: {told}; weights and gradients take {sent['seconds']:.2f} s, "
        f"of which {sent['not_hidden']:.2f} s are not hidden by compute"
    )


def _saves(saves: Values) -> str:
    return (
        f"{saves['gb']:,.1f} GB, {saves['stall']:.1f} s of stall, written in {saves['write']:,.0f} s; a failure "
        f"every {saves['mtbf'] / 3600:,.0f} h: checkpoint.every={saves['every']} ({saves['interval'] / 60:.0f} min; "
        f"Young {saves['young'] / 60:.0f}, Daly {saves['daly'] / 60:.0f}), goodput {100 * saves['goodput']:.1f} %; "
        f"with checkpoint.mode=sync every {saves['sync_every']}, {100 * saves['sync_goodput']:.1f} %"
    )


def _bucket_table(stage: Values) -> Table:
    table = Table(
        title="Buckets: a micro-batch of each, on a rank", title_justify="left", pad_edge=False
    )
    for name in (
        "bucket",
        "tokens",
        "clips",
        "of clips",
        "of micro-b.",
        "TFLOP a clip",
        "TFLOP",
        "seconds",
    ):
        table.add_column(name, justify="left" if name == "bucket" else "right", no_wrap=True)
    rows = sorted(stage["buckets"], key=lambda row: -row["tokens"])
    for row in rows[:12]:
        table.add_row(
            row["name"], f"{row['tokens']:,}", str(row["clips"]), percent(row["share"]),
            percent(row["micro_batch_share"]), f"{row['tflop_a_clip']:,.1f}",
            f"{row['tflop_a_micro_batch']:,.0f}", f"{row['seconds']:.2f}",
        )  # fmt: skip
    if len(rows) > 12:
        table.caption = f"and {len(rows) - 12} smaller ones; --json has all"
    return table


def _candidate_table(stage: Values, plan: Values) -> Table:
    table = Table(
        title=f"Best of {stage['tried']:,} layouts that fit {plan['cluster']['memory_gib']:g} GiB",
        title_justify="left", pad_edge=False,
    )  # fmt: skip
    for name in ("layout", "memory options", "GiB", "s a step", "MFU", "slower"):
        table.add_column(
            name, justify="left" if "o" in name and " " in name or name == "layout" else "right"
        )
    for row in stage["candidates"]:
        table.add_row(
            row["layout"], row["options"], _gib(row["memory"]), f"{row['seconds']:.2f}",
            percent(row["mfu"]), f"{100 * row['slower']:.1f} %" if row["slower"] > 0 else "-",
        )  # fmt: skip
    return table


def _gib(memory: Values) -> str:
    """The peak; with a tilde where it is estimated and not counted."""
    return f"{'~' if memory['when'] == 'estimated' else ''}{memory['peak'] / GIB:.1f}"


def _total(plan: Values) -> Table:
    table = Table(title="Stages", title_justify="left", pad_edge=False)
    for name in ("stage", "steps", "s a step", "MFU", "goodput", "days", "GPU-hours", "cost"):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for row in total_rows(plan):
        table.add_row(*row)
    return table


def total_rows(plan: Values) -> Iterable[list[str]]:
    """A row for each stage, and one for all of them where there are several."""
    for stage in plan["stages"]:
        yield [
            stage["name"], f"{stage['steps']:,}", f"{stage['step']['seconds']:.2f}",
            percent(stage["step"]["mfu"]), f"{100 * stage['saves']['goodput']:.1f} %",
            f"{stage['hours'] / 24:,.1f}", f"{stage['gpu_hours']:,.0f}", f"${stage['cost']:,.0f}",
        ]  # fmt: skip
    total = plan["total"]
    if len(plan["stages"]) > 1:
        yield [
            "in all", f"{sum(stage['steps'] for stage in plan['stages']):,}", "", "", "",
            f"{total['days']:,.1f}", f"{total['gpu_hours']:,.0f}", f"${total['cost']:,.0f}",
        ]  # fmt: skip


def header(plan: Values) -> list[str]:
    """What the head of an experiment's file says of hours and cost: the totals, and a line a stage."""
    cluster, total = plan["cluster"], plan["total"]
    lines = [
        f"Hardware: {cluster['name']}. Planned: {total['hours']:,.0f} hours ({total['days']:,.1f} days), "
        f"{total['gpu_hours']:,.0f} GPU-hours, ${total['cost']:,.0f} at ${cluster['price']:g} an hour."
    ]
    if len(plan["stages"]) > 1:
        lines += [
            f"  {stage['name']}: {stage['steps']:,} steps of {stage['step']['seconds']:.2f} s, MFU "
            f"{percent(stage['step']['mfu'])}, {stage['hours']:,.0f} h, ${stage['cost']:,.0f}"
            for stage in plan["stages"]
        ]
    return lines
