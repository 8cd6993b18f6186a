"""HTML pages from the templates in `report/`; all of them share `report/look.css`."""

from __future__ import annotations

from typing import Any

from protoseg.tasks.evaluation import percent


def rendered(template: str, **values: Any) -> str:
    """A page as one string, names from data escaped. A value the template needs and does not get is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("protoseg.tasks", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"percent": percent}
    return environment.get_template(template).render(**values)
