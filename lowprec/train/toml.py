"""TOML: texts with `section.key=value` overrides become plain data, and plain data becomes text.

The standard library reads TOML only, and what a config needs of writing is no more than this.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from lowprec.errors import ConfigError

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}


def read_config(path: str | Path) -> str:
    """The text of a config. Raises `ConfigError` if there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"the config {path} is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"the config {path} cannot be read: {error.strerror or error}") from None


def parse_toml(text: str, overrides: Iterable[str], name: str) -> dict[str, Any]:
    """TOML with `section.key=value` overrides applied, as nested plain data. Raises `ConfigError`."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not valid TOML: {error}") from None
    for override in overrides:
        override_value(raw, override)
    return raw


def override_value(raw: dict[str, Any], text: str) -> None:
    """Applies one `section.key=value`; the value is TOML, and a bare word is a string. Raises `ConfigError`."""
    path, equals, value = text.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or len(keys) < 2 or not all(keys):
        raise ConfigError(f"--set {text!r} is not of the form section.key=value")
    put_value(raw, path, _given(value.strip(), text), f"--set {text!r}")


def put_value(raw: dict[str, Any], path: str, value: Any, what: str) -> None:
    """Sets `section.key` of nested plain data; `what` begins the error where the path leads through no table."""
    table = raw
    *parents, last = (key.strip() for key in path.split("."))
    for key in parents:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{what}: {key!r} is not a table")
    table[last] = value


def _given(value: str, text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {value}")
        if set(parsed) == {"value"}:
            return parsed["value"]
    except tomllib.TOMLDecodeError:
        pass
    if not value or value[0] in "\"'[{" or "\n" in value:
        raise ConfigError(f"--set {text!r}: the value is not valid TOML")
    return value


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
