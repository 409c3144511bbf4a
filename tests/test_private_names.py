"""The private names of Transformers and Trainer that the code relies on are as `private_names.json` has them.

It says for each what it takes, from the named version on until the next one: an upgrade that moves one of them fails
here, in seconds and by name. CONTRIBUTING says what to do then.
"""

import ast
import importlib
import inspect
import json
from pathlib import Path
from pkgutil import resolve_name, walk_packages
from textwrap import dedent
from types import ModuleType

import pytest
import transformers

import admin_hf
import training


TABLE: dict[str, dict[str, str]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))


def as_it_is(name: str) -> str:
    """The parameters of a function, by name and kind, or the type of another attribute."""
    found = resolve_name(name)
    if not callable(found):
        return type(found).__name__
    signature = inspect.signature(found)
    empty = inspect.Parameter.empty
    bare = [parameter.replace(annotation=empty, default=empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=empty))


@pytest.mark.parametrize("name", TABLE)
def test_a_private_name_is_as_written_down(name):
    versions = {tuple(map(int, version.split("."))): text for version, text in TABLE[name].items()}
    assert list(versions) == sorted(versions)
    latest = max(version for version in versions if version <= VERSION)
    assert as_it_is(name) == versions[latest], f"{name} has changed in Transformers {transformers.__version__}"


def test_every_private_name_that_the_code_relies_on_is_written_down():
    assert sorted(relied_on() - TABLE.keys()) == []


def relied_on() -> set[str]:
    """What classes of ours override or use of their bases in Transformers, and functions of its modules.

    A method is private by its name, or because Transformers does not export its class.
    """
    found = set()
    for package in (admin_hf, training):
        for info in walk_packages(package.__path__, f"{package.__name__}."):
            if not info.name.endswith("__main__"):
                module = importlib.import_module(info.name)
                found |= functions(module)
                ours = (each for each in vars(module).values() if inspect.isclass(each))
                found |= {name for each in ours if each.__module__ == info.name for name in methods(each)}
    return found


def functions(module: ModuleType) -> set[str]:
    theirs = (each for each in vars(module).values() if inspect.isfunction(each))
    return {
        f"{each.__module__}:{each.__qualname__}"
        for each in theirs
        if (each.__module__ or "").startswith("transformers.") and not hasattr(transformers, each.__name__)
    }


def methods(ours: type) -> set[str]:
    tree = list(ast.walk(ast.parse(dedent(inspect.getsource(ours)))))
    # What Transformers notes in a class while it runs is nobody's reliance
    noted = {name for name in vars(ours) if name.endswith("_cached_value")}
    names = (vars(ours).keys() - noted) | {node.attr for node in tree if isinstance(node, ast.Attribute)}
    defined = {node.name for node in tree if isinstance(node, ast.FunctionDef)}
    found = set()
    for name in names:
        bases = [base for base in ours.__mro__[1:] if name in vars(base)]
        if not bases or not bases[0].__module__.startswith("transformers."):
            continue
        is_private = name.startswith("_") and not name.endswith("__")
        is_defined = name in defined and not hasattr(transformers, bases[0].__name__)
        if is_private or is_defined:
            found.add(f"{bases[0].__module__}:{bases[0].__name__}.{name}")
    return found
