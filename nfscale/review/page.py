"""Pages that need nothing else: a template with its style sheet in it."""

from functools import partial
from importlib.resources import files as resources
from typing import Any

import jinja2

from nfscale.store.schema import quality_text


def rendered(template: str, quality_name: str, context: dict[str, Any]) -> str:
    """A template of this folder as one HTML file; numbers go through the filter `quality` as their unit deserves."""
    here = resources("nfscale.review")
    pages = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters["quality"] = partial(quality_text, quality_name)
    pages.globals["duration"] = duration_text
    text = (here / template).read_text(encoding="utf-8")
    return pages.from_string(text).render(css=(here / "page.css").read_text(encoding="utf-8"), **context)


def duration_text(seconds: float) -> str:
    """`35 s`, `12.5 min`, `7.2 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
