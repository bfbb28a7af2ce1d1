"""Build the API reference of the package in docs/api/: ``python docs/build_api.py``. It needs pdoc."""

from __future__ import annotations

import argparse
import pkgutil
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import jinja2
import pdoc
import pdoc.render

import pixart_nb

FOLDER = Path(__file__).parent / "api"
#: Programs, which have ``--help``.
LEFT_OUT = ("pixart_nb.cli", "pixart_nb.__main__")
#: pdoc's own rules leave out ``__call__``, which is what a user of a pipeline calls, and the submodules of a package
#: with ``__all__``.
TEMPLATE = """
{% extends "default/module.html.jinja2" %}
{% block nav_submodules %}
    {% for name in all_modules if name.rpartition(".")[0] == module.modulename %}
        {% if loop.first %}<h2>Submodules</h2><ul>{% endif %}
        <li>{{ (name, "") | link(text=name.rpartition(".")[2]) }}</li>
        {% if loop.last %}</ul>{% endif %}
    {% endfor %}
{% endblock %}
{% macro is_public(doc) %}
    {% if doc.name == "__call__" and doc.docstring %}true
    {% elif doc.name == "__init__" and doc.kind == "function" %}
        {{ "true" if doc.docstring or doc.signature_without_self.parameters else "" }}
    {% elif doc.kind == "module" %}{{ "true" if doc.fullname in all_modules else "" }}
    {% elif doc.name == "sampling_defaults" %}
    {% elif not doc.name.startswith("_") %}true
    {% endif %}
{% endmacro %}
"""


def module_names() -> list[str]:
    """Return the names of all modules but those of the command line."""
    modules = pkgutil.walk_packages(pixart_nb.__path__, "pixart_nb.")
    return ["pixart_nb", *(module.name for module in modules if not module.name.startswith(LEFT_OUT))]


def resolve(package: ModuleType) -> None:
    """Import the lazy names of a package, so that pdoc finds what they stand for."""
    for name in package.__all__ if "__getattr__" in vars(package) else ():
        vars(package).setdefault(name, getattr(package, name))


def build(folder: Path, names: Sequence[str]) -> None:
    """Write the pages of the modules with these names, an index and a search into ``folder``."""
    for name in names:
        resolve(import_module(name))
    pdoc.render.configure(docformat="google")
    env = pdoc.render.env
    env.loader = jinja2.ChoiceLoader([jinja2.DictLoader({"module.html.jinja2": TEMPLATE}), env.loader])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The module specification")  # pdoc adds the modules of some packages itself
        warnings.filterwarnings("ignore", "Error parsing type annotation")  # their text is shown
        pdoc.pdoc(*names, *(f"!{name}" for name in LEFT_OUT), output_directory=folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the pages")
    parser.add_argument("modules", nargs="*", help="names of modules; all by default")
    options = parser.parse_args()
    build(options.output, options.modules or module_names())
