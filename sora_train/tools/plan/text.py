"""The plan in the terminal: at most 100 columns, each table with a line that says how to read it."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sora_train.tools.plan.memory.plan import KINDS
from sora_train.tools.plan.time.cluster import GIB

Values = dict[str, Any]
WIDTH = 100


def show(plan: Values, console: Console) -> None:
    """Print the plan of `plan_run`."""
    cluster = plan["cluster"]
    console.print(
        Text.assemble(
            (plan["name"], "bold"),
            f" on {cluster['name']}: {cluster['nodes']} node(s), "
            f"{cluster['memory_gib']:g} GiB and {cluster['tflops']:g} TFLOP/s (bf16, dense) a GPU, "
            f"${cluster['price']:g} an hour",
        )
    )
    console.print(f"parameters that are trained: {plan['parameters']:,}")
    for stage in plan["stages"]:
        _stage(stage, plan, console)
    console.print()
    console.print(_total(plan))
    for note in plan["notes"]:
        console.print(f"assumed: {note}", style="dim")
    console.print(
        "all assumptions: docs/plan.md; set them by plan.KEY=..., the machine's by cluster.KEY=...",
        style="dim",
    )


def _stage(stage: Values, plan: Values, console: Console) -> None:
    step = stage["step"]
    console.rule(f"{stage['name']}: {stage['steps']:,} steps", align="left")
    facts = Table(show_header=False, box=None, padding=(0, 1, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("layout", f"{stage['layout']}; memory options: {stage['options']}")
    facts.add_row(
        "a step",
        f"{step['seconds']:.2f} s, MFU {percent(step['mfu'])}, {step['tokens_per_second']:,.0f} tokens/s; "
        f"{stage['micro_batches']} micro-batches ({stage['slots']} a rank), {step['clips']:,.0f} clips, "
        f"{step['tokens']:,.0f} tokens",
    )
    facts.add_row(
        "operations",
        f"{step['tflop']:,.0f} TFLOP of the model = {step['formula']}; {step['recomputed_tflop']:,.0f} more computed "
        "again",
    )
    kernel = step["kernel"]
    facts.add_row(
        "attention",
        f"{kernel['kernel']}, {percent(kernel['forward'])} of the peak forward and {percent(kernel['backward'])} "
        f"backward; matrix products {percent(kernel['gemm'])}",
    )
    facts.add_row("encoding", _encoding(stage["caching"]))
    facts.add_row("memory", _memory(stage["memory"]))
    facts.add_row("sent", _sent(stage["communication"]))
    facts.add_row("imbalance", f"{percent(step['imbalance'])} of a row of micro-batches is waiting")
    facts.add_row("saves", _saves(stage["saves"]))
    total = f"{stage['hours']:,.1f} h, {stage['gpu_hours']:,.0f} GPU-hours, ${stage['cost']:,.0f}"
    facts.add_row("in all", total)
    console.print(facts)
    console.print(_time_table(stage))
    console.print(_bucket_table(stage))
    console.print(_candidate_table(stage, plan))
    if stage["refused"]:
        console.print("Not these:", style="bold")
        for layout in stage["refused"]:
            console.print(f"  {layout['name']}: {layout['reason']}")
    console.print("To paste:", style="bold")
    for line in pasted(stage["overrides"]):
        console.print(f"  {line}", soft_wrap=True)


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


def _memory(memory: Values) -> str:
    """The peak of one rank and its parts."""
    peak = f"{memory['peak'] / GIB:.1f} GiB a rank ({memory['when']})"
    parts = [f"{kind} {memory[kind] / GIB:.1f}" for kind in KINDS if memory.get(kind)]
    return f"{peak}: {', '.join(parts)}" if parts else peak


def _encoding(caching: Values) -> str:
    """Cached or online, with the hours of both and the disk."""
    mode, hours = caching["mode"], {name: caching[name] / 3600 for name in ("once", "online")}
    way = "each time a clip is trained" if mode == "none" else "once a clip"
    spilled = (
        f"; {percent(caching['spilled'])} of the captions have no room and are encoded each time"
        if mode != "none" and caching["spilled"]
        else ""
    )
    return (
        f"data.cache={mode}, {way}, since {caching['why']}: once {hours['once']:,.0f} GPU-hours and "
        f"{caching['gb']:,.0f} GB, each time {hours['online']:,.0f} GPU-hours, for {caching['clips']:,.0f} clips of "
        f"which {caching['trained']:,.0f} are trained{spilled}"
    )


def _time_table(stage: Values) -> Table:
    """A step by what it is spent on, and what of that the card would not need at its best."""
    step, slots = stage["step"], stage["slots"]
    table = _titled(
        f"A step: milliseconds of a rank and its {slots} micro-batches (predicted)",
        ("part",),
        ("ms", "share", "at its best", "more than that"),
    )
    parts = sorted(step["parts"].items(), key=lambda part: -part[1])
    for name, seconds in parts:
        if seconds >= 5e-4:
            best = step["floors"].get(name, 0.0)
            table.add_row(
                name, f"{1e3 * seconds:,.0f}", percent(seconds / step["seconds"]),
                f"{1e3 * best:,.0f}", f"{1e3 * (seconds - best):,.0f}",
            )  # fmt: skip
    over, bar = step["seconds"] - step["at_bar"], percent(step["bar"])
    table.caption = (
        f"MFU {percent(step['mfu'])}: {abs(1e3 * over):,.0f} ms {'above' if over > 0 else 'below'} the "
        f"{1e3 * step['at_bar']:,.0f} ms of {bar}" + (f"; first {_gaps(step)}" if over > 0 else "")
    )
    return table


def _gaps(step: Values) -> str:
    """The three largest parts above their best, with their milliseconds."""
    gaps = {name: value - step["floors"].get(name, 0.0) for name, value in step["parts"].items()}
    largest = sorted(gaps.items(), key=lambda gap: -gap[1])[:3]
    return ", ".join(f"{name} {1e3 * gap:,.0f}" for name, gap in largest)


def _sent(sent: Values) -> str:
    if not sent["gb"]:
        return "nothing"
    kinds = ", ".join(f"{kind} {value:,.1f} GB" for kind, value in sent["gb"].items())
    return (
        f"by a rank in a step: {kinds}; weights and gradients take {sent['seconds']:.2f} s, "
        f"of which {sent['not_hidden']:.2f} s are not hidden by compute"
    )


def _saves(saves: Values) -> str:
    return (
        f"{saves['gb']:,.1f} GB, {saves['stall']:.1f} s of stall, written in {saves['write']:,.0f} s; a failure "
        f"every {saves['mtbf'] / 3600:,.0f} h: checkpoint.every={saves['every']} ({saves['interval'] / 60:.0f} min; "
        f"Young {saves['young'] / 60:.0f}, Daly {saves['daly'] / 60:.0f}), goodput {100 * saves['goodput']:.1f} %; "
        f"with checkpoint.mode=sync every {saves['sync_every']}, {100 * saves['sync_goodput']:.1f} %"
    )


def _titled(
    title: str, words: Sequence[str], numbers: Sequence[str], no_wrap: bool = True
) -> Table:
    """An empty table with columns of words, then of numbers."""
    table = Table(title=title, title_justify="left", pad_edge=False)
    for name in words:
        table.add_column(name, no_wrap=no_wrap)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=no_wrap)
    return table


def _bucket_table(stage: Values) -> Table:
    numbers = ("tokens", "clips", "of clips", "of micro-b.", "TFLOP a clip", "TFLOP", "seconds")
    table = _titled("Buckets: a micro-batch of each, on a rank", ("bucket",), numbers)
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
    table = _titled(
        f"Best of {stage['tried']:,} layouts that fit {plan['cluster']['memory_gib']:g} GiB",
        ("layout", "memory options"),
        ("GiB", "s a step", "MFU", "slower"),
        no_wrap=False,
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
    numbers = ("steps", "s a step", "MFU", "goodput", "days", "GPU-hours", "cost")
    table = _titled("Stages", ("stage",), numbers)
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
