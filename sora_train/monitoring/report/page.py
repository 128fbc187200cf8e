"""Pages of HTML, each one file that needs no network, made from templates of jinja2."""

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **values: object) -> str:
    """The page of a template, whose path is below the package, as `tools/plan/page.html`.

    Text is escaped; what is HTML already (`markupsafe.Markup`, a chart) is not.
    """
    environment = Environment(
        loader=PackageLoader("sora_train", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["compact"] = compact
    return environment.get_template(template).render(values)


def compact(number: float) -> str:
    """`812`, `6.1 K`, `14.2 M`, `1.30 B`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}"
