"""Cross references of docstrings, written as Hugging Face writes them, as links of the documentation site."""

import re
from typing import Any

import griffe


class CrossReferences(griffe.Extension):
    """Makes [`name`] and [`~module.name`] links where the reference has the name, and code where it has not."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        self._link(pkg, pkg.path)

    def _link(self, obj: griffe.Object, package: str) -> None:
        def linked(reference: re.Match[str]) -> str:
            path = name = reference[1]
            if "." not in name:
                try:
                    path = obj.resolve(name)
                except griffe.NameResolutionError:
                    path = f"{package}.{name}"
            code = f"<code>{name.rpartition('.')[2]}</code>"
            return f'<autoref optional identifier="{path}">{code}</autoref>'

        if obj.docstring:
            obj.docstring.value = re.sub(r"\[`~?([\w.]+)`\]", linked, obj.docstring.value)
        for member in obj.members.values():
            if not member.is_alias:
                self._link(member, package)
