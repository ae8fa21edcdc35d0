"""Writes TOML. The standard library reads it only, and a config needs no more than this."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import date, datetime, time
from typing import Any

from lowprec.errors import ConfigError

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}


def toml_text(document: Mapping[str, Any]) -> str:
    """TOML of nested mappings, lists, strings, numbers, booleans and dates, in the order given.

    `tomllib.loads(toml_text(document))` equals `document`.

    Raises:
        ConfigError: a value that TOML has no notation for (None, an object).
    """
    lines: list[str] = []
    _table((), document, lines)
    return "\n".join(lines).strip("\n") + "\n"


def _table(path: tuple[str, ...], table: Mapping[str, Any], lines: list[str]) -> None:
    plain = {key: value for key, value in table.items() if not isinstance(value, Mapping) and not _are_tables(value)}
    if path and (plain or not table):
        lines += ["", f"[{'.'.join(_key(part) for part in path)}]"]
    lines += [f"{_key(key)} = {_value(value, (*path, key))}" for key, value in plain.items()]
    for key, value in table.items():
        if isinstance(value, Mapping):
            _table((*path, key), value, lines)
        elif _are_tables(value):
            for one in value:
                lines += ["", f"[[{'.'.join(_key(part) for part in (*path, key))}]]"]
                lines += [f"{_key(name)} = {_value(item, (*path, key, name))}" for name, item in one.items()]


def _are_tables(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(one, Mapping) for one in value)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _string(key)


def _value(value: Any, path: tuple[str, ...]) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if math.isnan(value):
            return "nan"
        text = repr(value)
        return text if "." in text or "inf" in text else text.replace("e", ".0e") if "e" in text else f"{text}.0"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(item, path) for item in value)}]"
    if isinstance(value, Mapping):
        items = ", ".join(f"{_key(key)} = {_value(item, (*path, key))}" for key, item in value.items())
        return f"{{ {items} }}" if items else "{}"
    raise ConfigError(f"{'.'.join(path)} is of type {type(value).__name__}, which a TOML file cannot hold")


def _string(text: str) -> str:
    escaped = "".join(
        _ESCAPES.get(char) or (f"\\u{ord(char):04x}" if ord(char) < 0x20 or ord(char) == 0x7F else char)
        for char in text
    )
    return f'"{escaped}"'
