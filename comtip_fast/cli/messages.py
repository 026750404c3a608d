"""Messages of the library on the command line: a marked Python argument becomes the option that sets it.

The library marks arguments and settings in its messages: ```mpp```, ```tile_px=224``` or ```data.tile_px=224```. Here they
become ``--mpp``, ``--tile-px 224`` and ``--set data.tile_px=224``. For this, the ``dest`` of each option is the name of the
Python argument.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping

_MARKED = re.compile(r"`([a-z]\w*(?:\.\w+)*)(?:=([^`\s]*))?`")


def options_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return ``{name of the Python argument: option}`` of a command and its subcommands."""
    found: dict[str, str] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                found |= options_of(sub)
        elif action.option_strings:
            found[action.dest] = action.option_strings[-1]
    return found


def name_options(text: str, own: Mapping[str, str], other: Callable[[], Mapping[str, str]]) -> str:
    """Return a message with options instead of Python arguments.

    Parameters
    ----------
    text
        A message of the library.
    own
        :func:`options_of` the command that runs.
    other
        Returns the options of the command that builds shards, which messages of other commands name too.

    Returns
    -------
    str
        The message. A name that is no option stays as it is.
    """

    def option(match: re.Match[str]) -> str:
        name, value = match.groups()
        if "." in name:
            return match[0] if value is None else f"--set {name}={value}"
        found = own.get(name) or other().get(name)
        if found is None:
            return match[0]
        return found if value is None else f"{found} {value}"

    return _MARKED.sub(option, text)
