"""The page of `/docs`: every route with its fields and answers, without scripts or anything from elsewhere."""

from typing import Any

import jinja2

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ api.info.title }}: the API</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222428 }
h2 { margin-top: 2.5rem; font-size: 1.1rem }
code { font-size: .95em }
td { vertical-align: top; padding: .2rem 1rem .2rem 0 }
table { border-collapse: collapse }
tr { border-bottom: 1px solid #e2e2de }
.kind { color: #62666c; white-space: nowrap }
</style>
<h1>{{ api.info.title }}</h1>
<p>{{ api.info.summary }} The same for programs: <a href="/openapi.json">openapi.json</a>.</p>
{% for path, methods in api.paths.items() %}{% for method, route in methods.items() %}
<h2><code>{{ method|upper }} {{ path }}</code></h2>
<p>{{ route.description or route.summary }}</p>
{% set body = route.get("requestBody", {}).get("content", {}) %}
{% if route.parameters or body %}<table>
{% for one in route.parameters or [] %}<tr><td><code>{{ one.name }}</code></td>
<td class="kind">{{ one["in"] }}{{ ", required" if one.required }}</td><td>{{ one.description or "" }}</td></tr>
{% endfor %}
{% set form = body.get("multipart/form-data", {}).get("schema", {}) %}
{% for name, field in form.get("properties", {}).items() %}<tr><td><code>{{ name }}</code></td>
<td class="kind">{{ kind(field) }}{{ ", required" if name in form.get("required", []) }}</td>
<td>{{ field.description or "" }}</td></tr>
{% endfor %}</table>{% endif %}
<p class="kind">Answers: {{ route.responses|join(", ") }}</p>
{% endfor %}{% endfor %}
</html>
"""


def page_of(api: dict[str, Any]) -> str:
    """The page of an OpenAPI document."""
    template = jinja2.Environment(autoescape=True).from_string(_PAGE)
    return template.render(api=api, kind=_kind)


def _kind(field: dict[str, Any]) -> str:
    if field.get("format") == "binary":
        return "file"
    kinds = [one.get("type") for one in (field, *field.get("anyOf", []))]
    return " or ".join(str(kind) for kind in kinds if kind and kind != "null") or "any"
