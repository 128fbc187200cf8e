"""The plan as one HTML file: memory of the candidates beside the card's limit, time by bucket, stages in time."""

from typing import Any

from sora_train.monitoring.report.charts import Bar, bar_chart
from sora_train.monitoring.report.page import render
from sora_train.tools.plan.text import pasted, percent, total_rows
from sora_train.tools.plan.time.cluster import GIB

Values = dict[str, Any]


def page(plan: Values) -> str:
    """The page of `plan_run`'s values."""
    cluster, total = plan["cluster"], plan["total"]
    return render(
        "tools/plan/page.html",
        title=f"Plan of {plan['name']}",
        cluster=cluster,
        tiles={
            f"on {cluster['name']}": f"{total['days']:,.1f} days",
            "GPU-hours": f"{total['gpu_hours']:,.0f}",
            f"at ${cluster['price']:g} a GPU-hour": f"${total['cost']:,.0f}",
            "parameters trained": f"{plan['parameters'] / 1e9:.2f} B",
        },
        time_line=time_line(plan["stages"]),
        totals=list(total_rows(plan)),
        stages=[stage | stage_page(stage, cluster["memory_gib"]) for stage in plan["stages"]],
        notes=plan["notes"],
        assumptions=[(f"plan.{key}", str(value)) for key, value in plan["assumptions"].items()],
    )


def stage_page(stage: Values, memory_gib: float) -> Values:
    """The charts and texts of a stage."""
    memory = [
        Bar(
            f"{row['layout']} ({row['options']})",
            {
                name: value / GIB
                for name, value in row["memory"].items()
                if name not in ("peak", "when")
            },
        )
        for row in stage["candidates"]
    ]
    longest = sorted(stage["buckets"], key=lambda row: -row["tokens"])[:12]
    buckets = [Bar(f"{row['clips']} x {row['name']}", row["parts"]) for row in longest]
    return {
        "mfu": percent(stage["step"]["mfu"]),
        "paste": "\n".join(pasted(stage["overrides"])),
        "charts": [
            (
                "Memory of a rank by layout, GiB",
                bar_chart(memory, memory_gib, f"{memory_gib:g} GiB"),
            ),
            (
                "A step by what it is spent on, seconds",
                bar_chart([Bar("a step", stage["step"]["parts"])]),
            ),
            ("A micro-batch of each bucket, seconds", bar_chart(buckets)),
        ],
    }


def time_line(stages: list[Values]) -> str:
    """An SVG element: each stage from its first to its last day, with its cost."""
    bars, day = [], 0.0
    for stage in stages:
        days = stage["hours"] / 24
        bars.append(Bar(stage["name"], {"": days}, start=day, note=f"${stage['cost']:,.0f}"))
        day += days
    return bar_chart(bars)
