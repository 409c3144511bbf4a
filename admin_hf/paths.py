"""The part of a path or a name that may be published: no folder of the machine."""

import os
import re
from pathlib import PureWindowsPath
from typing import Any


# Arguments whose slashes are text
_TEXTS = ("source_prefix", "optim_target_modules")


def is_hub_id(name: str) -> bool:
    """Whether a name can only be one on the Hub, `user/name` or `name`, and is not a local file."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) is not None and not os.path.exists(name)


def published(value: Any, name: str = "") -> Any:
    """The publishable form of an argument's value: of a path, also in a list or dict, only the last part.

    Args:
        name: name of the argument, because some arguments are text.

    Example:

    ```python
    >>> published("/home/me/corpus/train.csv"), published("user/corpus"), published("C:\\\\my\\\\corpus")
    ('train.csv', 'user/corpus', 'corpus')

    ```
    """
    if isinstance(value, dict):
        return {key: published(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [published(item, name) for item in value]
    if not isinstance(value, str) or name in _TEXTS or (is_hub_id(value) and not name.endswith("_file")):
        return value
    if not re.search(r"[/\\]|^~|^\.", value):
        return value
    if os.path.exists(value):  # also "." and ".."
        value = os.path.abspath(value)
    return PureWindowsPath(value).name  # which knows both kinds of paths
