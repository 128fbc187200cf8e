"""Pages of HTML, each one file that needs no network, made from templates of jinja2."""

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined


def render(template: str, package: str = "sora_train", **values: object) -> str:
    """The page of a template, whose path is below `package`, as `tools/plan/page.html`; it may extend those of here.

    Text is escaped; what is HTML already (`markupsafe.Markup`, a chart) is not.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name, ".") for name in (package, "sora_train")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"compact": compact, "hours": hours}
    return environment.get_template(template).render(values)


def hours(value: float) -> str:
    """`1.2 h`, `3.4 min`, `12.0 s`."""
    for size, unit in ((1.0, "h"), (1 / 60, "min")):
        if value >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value * 3600:.1f} s"


def compact(number: float) -> str:
    """`812`, `6.1 K`, `14.2 M`, `1.30 B`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}"
