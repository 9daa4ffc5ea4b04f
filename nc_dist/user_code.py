"""The user's own code, named in a run file or an export: imported only where the user allowed it.

The permission is an environment variable, so that every process that a run starts has it; importing what a file names
is running code, and files come from anywhere.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from nc_dist.errors import InputError

VARIABLE = "NC_DIST_ALLOW_USER_CODE"


def allow() -> None:
    """Allow it in this process and those it starts."""
    os.environ[VARIABLE] = "1"


def is_allowed() -> bool:
    """Whether it is."""
    return os.environ.get(VARIABLE) == "1"


def function(name: str, where: str) -> Callable[..., Any]:
    """What `package.module:function` names, found from the working folder too.

    `where` begins the message of the InputError when it is not allowed or not found.
    """
    if not is_allowed():
        raise InputError(
            f"{where}: runs code that is not nc_dist's; if you trust it, say so with --allow-user-code, or {VARIABLE}=1"
        )
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # of code that is not ours
        raise InputError(f"{where}: cannot be imported from {os.getcwd()}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise InputError(f"{where}: is a {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]
