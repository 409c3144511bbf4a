"""The page as a whole: sections in the order in which they are read, put into the template."""

import re
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ..run.folder import Run
from . import weights
from .curves import curves
from .sections import Section, arguments, divergence, facts, model_line, scores, status


TEMPLATE = "page.html.jinja"
# All but the last part of a path: one in quotes or alone, which may have spaces; one anywhere; and one of Windows
_FOLDERS = re.compile(
    r"""(?:^|(?<=['"]))(?:~?/|~)(?:[^/'":,]+/)+(?=[^/'":,]*(?:['"]|$))"""
    r"""|(?:file://|(?<![\w./:])|(?<=:)(?!//))(?:~?/|~)(?:[^\s/'":,]+/)+"""
    r"""|\b[A-Za-z]:\\(?:[^\\'":,]+\\)+"""
)


def render(run: Run) -> str:
    """The HTML of a run's page."""
    sections = [divergence(run)] if run.divergence else []
    sections += [scores(run), curves(run), weights.translations(run), weights.omega(run)]
    sections += [*weights.measurements(run), arguments(run)]
    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        finalize=without_folders,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["formulas"] = formulas
    page = environment.get_template(TEMPLATE).render(
        name=str(run.arguments.get("run_name") or run.folder.resolve().name),
        status=status(run),
        model=model_line(run),
        facts=facts(run),
        sections=[section for section in sections if not _is_empty(section)],
        made=f"Made by admin-hf {version('admin-hf')} on {datetime.now(UTC):%Y-%m-%d} from the run's own files.",
    )
    return re.sub(r"(?<![A-Za-z0-9])hf_\w{20,}", "hf_…", page)  # a token of the Hub, at any place


def without_folders(value: Any) -> Any:
    """Keep only the last part of a path on this machine; markup is not changed."""
    if type(value) is not str:
        return value
    return _FOLDERS.sub("", value)


def formulas(text: str) -> Markup:
    """Text with the subscripts and exponents of β_{i,j}, x_1 and i^-0.5 set as such."""
    text = re.sub(r"(?<=[^\W_])_(?:\{([^{}]*)\}|(\d+|[a-z]|[ij]{2})\b)", r"<sub>\1\2</sub>", str(escape(text)))
    return Markup(re.sub(r"\^(-?[\d.]*\d)", r"<sup>\1</sup>", text))


def _is_empty(section: Section) -> bool:
    return not (section.text or section.notes or section.pictures or section.tables or section.samples)
