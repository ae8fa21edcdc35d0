"""`--dynamic image:0=batch,2=height`: which axes of which inputs are free, on the command line."""

from __future__ import annotations

import re

from lowprec.errors import ConfigError

FORM = "NAME:AXIS[=LENGTH],..."
_ENTRY = re.compile(r"(\d+)(?:=(.+))?")


def free_axes(words: list[str] | None) -> dict[str, dict[int, str]] | None:
    """`dynamic_shapes` of `export` from words of the form `image:0=batch,2=2*height`; None for no words.

    An axis without a name of its own is called by its input and number. `image:` alone has no free axis.

    Raises:
        ConfigError: another form.
    """
    if words is None:
        return None
    result: dict[str, dict[int, str]] = {}
    for word in words:
        name, colon, listed = word.partition(":")
        entries = [_ENTRY.fullmatch(entry.strip()) for entry in listed.split(",") if entry.strip()]
        if not name or not colon or None in entries:
            raise ConfigError(f"--dynamic takes {FORM}, such as image:0=batch,2=height; found {word!r}")
        axes = {int(entry[1]): entry[2] or f"{name}_{entry[1]}" for entry in entries if entry is not None}
        result.setdefault(name, {}).update(axes)
    return result
