"""Every name of TensorRT's API that the adapter uses, read from its source, and a check of them against a library.

Run as a script in an environment that has the library: `python tensorrt_names.py MODULE NAMES.json` prints those that
it lacks.
"""

import ast
import importlib
import json
import sys
from pathlib import Path

ADAPTER = Path(__file__).parents[1] / "export" / "backends" / "tensorrt"
# What the adapter calls its objects of the library's classes.
CLASSES = {
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "error": "ParserError",
    "inspector": "EngineInspector",
    "layer": "ILayer",
    "network": "INetworkDefinition",
    "onnx_refitter": "OnnxParserRefitter",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "refitter": "Refitter",
    "runtime": "Runtime",
}
# Tables of the adapter that hold members of an enumeration.
TABLES = {
    "COMPUTE_LAYERS": "LayerType",
    "_DTYPES": "DataType",
    "_FLAGS": "BuilderFlag",
    "_LEVELS": "HardwareCompatibilityLevel",
    "_NARROW": "DataType",
}
ONLY_RTX = "_set_targets"  # a function that other libraries never get to


def names_used(only_rtx: bool, sources: dict[str, str] | None = None) -> set[str]:
    """Dotted names: `BuilderFlag.TF32`, `IBuilderConfig.set_flag`.

    Args:
        only_rtx: names that are used with TensorRT-RTX alone, instead of the others.
        sources: by file name; the adapter's by default.
    """
    found: set[str] = set()
    for path in sorted(ADAPTER.glob("*.py")):
        tree = ast.parse((sources or {}).get(path.name) or path.read_text())
        for node in tree.body:
            if (getattr(node, "name", None) == ONLY_RTX) == only_rtx:
                found |= _names_in(node)
    return found


def keywords_used() -> list[str]:
    """Keywords in calls of the library, as `IBuilderConfig.set_flag(flag=)`."""
    found = []
    for path in sorted(ADAPTER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                found += [f"{name}({word.arg}=)" for name in _dotted(node.func) for word in node.keywords]
    return found


def _names_in(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found |= _dotted(node)
        elif isinstance(node, ast.ClassDef):  # what a subclass of the library's overrides
            bases = [base.attr for base in node.bases if isinstance(base, ast.Attribute)]
            methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
            found |= {f"{base}.{name}" for base in bases for name in methods if not name.startswith("_")}
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in TABLES:
            found |= {f"{TABLES[node.targets[0].id]}.{member}" for member in _members(node.value)}
    return found


def _dotted(node: ast.Attribute) -> set[str]:
    """The name that an attribute is, if it stands on the module (`trt`) or on an object of one of `CLASSES`."""
    parts, inner = [node.attr], node.value
    while isinstance(inner, ast.Attribute):
        parts.append(inner.attr)
        inner = inner.value
    parts = parts[::-1]
    if isinstance(inner, ast.Name) and inner.id == "self" and len(parts) == 2:
        parts, inner = parts[1:], ast.Name(parts[0].lstrip("_"))
    if isinstance(inner, ast.Name) and inner.id == "trt":
        return {".".join(parts)} - {"__version__"}
    if isinstance(inner, ast.Name) and inner.id in CLASSES:
        return {f"{CLASSES[inner.id]}.{parts[0]}"}
    return set()


def _members(value: ast.expr) -> set[str]:
    """The strings in a table: values of a dict that are upper case, its keys else, or elements of a set."""
    constants = [node.value for node in ast.walk(value) if isinstance(node, ast.Constant)]
    return {text for text in constants if isinstance(text, str) and text.isupper()}


def lacking(module: object, names: list[str]) -> list[str]:
    """Those of the names that a module does not have."""
    missing = []
    for name in names:
        found = module
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is None and not _has(module, name):
            missing.append(name)
    return missing


def _has(module: object, name: str) -> bool:
    *owner, last = name.split(".")
    found = module
    for part in owner:
        found = getattr(found, part, None)
    return hasattr(found, last)


if __name__ == "__main__":
    print(json.dumps(lacking(importlib.import_module(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))))
