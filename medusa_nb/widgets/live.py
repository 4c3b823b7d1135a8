"""What the live widgets share: HTML from templates, and whether somebody watches."""

from jinja2 import Environment, PackageLoader

from medusa_nb.progress import is_headless
from medusa_nb.widgets.style import drafted_by, in_order, tint

_TEMPLATES = Environment(loader=PackageLoader("medusa_nb.widgets"), autoescape=True, trim_blocks=True)
_TEMPLATES.globals["tint"] = tint


def render(name: str, **values) -> str:
    """The HTML of a template."""
    return _TEMPLATES.get_template(f"{name}.html.jinja").render(**values)


def tokens_html(pieces: list[str], groups: list[int | None], names: dict | None = None) -> str:
    """Tokens in a row, tinted by group; ``names`` are what the legend calls the groups."""
    legend = [(group, (names or {}).get(group, drafted_by(group))) for group in in_order(groups)]
    return render("tokens", cells=list(zip(pieces, groups, strict=True)), legend=legend)


def watched() -> bool:
    """Whether somebody may be watching: then widgets are live, otherwise they show one static picture."""
    return not is_headless()
