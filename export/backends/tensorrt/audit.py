"""Which types an engine computes in: of the typed network before it is built, of the engine afterwards."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lowprec.errors import UnsupportedError
from lowprec.export.backends.base import BuildOptions

# Layer types that compute; the others move, retype or hold values.
COMPUTE_LAYERS = frozenset(
    {
        "ACTIVATION", "ATTENTION_INPUT", "CONVOLUTION", "CUMULATIVE", "DECONVOLUTION", "EINSUM", "ELEMENTWISE",
        "LRN", "MATRIX_MULTIPLY", "NORMALIZATION", "PARAMETRIC_RELU", "POOLING", "REDUCE", "RESIZE", "SCALE",
        "SOFTMAX", "UNARY",
    }
)  # fmt: skip
_NARROW = {"fp16": "HALF", "bf16": "BF16"}
# How the inspector spells the types, by version.
_SPELLINGS = {"fp16": "HALF", "half": "HALF", "bf16": "BF16", "fp32": "FLOAT", "float": "FLOAT", "int8": "INT8"}
_BUILT_TYPE = re.compile("|".join(_SPELLINGS), re.IGNORECASE)


@dataclass(frozen=True)
class TypedLayer:
    """One layer of a typed network: its name, its kind, the ONNX nodes it came from, the type it computes in."""

    name: str
    kind: str
    nodes: tuple[str, ...]
    dtype: str


def audit(layers: Iterable[TypedLayer], options: BuildOptions) -> dict[str, Any]:
    """Holds the types of a network's layers against the precision asked for.

    fp16 and bf16: every computing layer is of that type but those named as wide. mixed: at least one is half. int8: at
    least one layer quantises. fp32: nothing is claimed.

    Returns:
        `layer_types`, counts per type of computing layers, and `wide_layers`, the names of float32 ones.

    Raises:
        UnsupportedError: float32 was found where a narrow type was asked for; names the layers.
    """
    layers = list(layers)
    computing = [typed for typed in layers if typed.kind in COMPUTE_LAYERS]
    counts = Counter(typed.dtype for typed in computing)
    wide = [typed for typed in computing if typed.dtype == "FLOAT"]
    asked = options.precision
    if asked in _NARROW:
        odd = [typed.name for typed in wide if not options.wide & {typed.name, *typed.nodes}]
        if odd or not counts[_NARROW[asked]]:
            shown = ", ".join(odd[:5]) + (f" and {len(odd) - 5} more" if len(odd) > 5 else "")
            raise UnsupportedError(
                f"asked for a {asked} engine, found float32 in {shown or 'every layer'}; "
                f"convert the ONNX graph to {asked} first, or name these nodes as wide"
            )
    if asked == "mixed" and not (counts["HALF"] or counts["BF16"]):
        raise UnsupportedError("asked for a mixed engine, found no half layer; convert the ONNX graph first")
    if asked == "int8" and not any(typed.kind == "QUANTIZE" for typed in layers):
        raise UnsupportedError("asked for an int8 engine, found no quantising layer; quantise the ONNX graph first")
    return {"layer_types": dict(sorted(counts.items())), "wide_layers": [typed.name for typed in wide]}


def typed_layers(network: Any) -> list[TypedLayer]:
    """The layers of a strongly typed network."""
    layers = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        nodes = tuple(re.findall(r"\[ONNX Layer: ([^\]]*)\]", layer.metadata or ""))
        dtype = layer.get_output(0).dtype.name if layer.num_outputs else "NONE"
        layers.append(TypedLayer(layer.name, layer.type.name, nodes, dtype))
    return layers


def built_types(trt: Any, engine: Any, precision: str) -> dict[str, Any] | None:
    """The types that a deserialised engine writes its layers' outputs in, by the engine inspector; None where it does
    not say.

    Raises:
        UnsupportedError: fp16 or bf16 was asked for, and every layer writes float32.
    """
    inspector = engine.create_engine_inspector()
    try:
        layers = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON)).get("Layers", [])
    except (ValueError, AttributeError):
        return None
    found: dict[str, list[str]] = {}
    for entry in layers:
        for output in entry.get("Outputs", []) if isinstance(entry, dict) else []:
            said = _BUILT_TYPE.search(str(output.get("Format/Datatype", "")))
            if said:
                found.setdefault(_SPELLINGS[said[0].lower()], []).append(str(entry.get("Name")))
    if not found:
        return None
    if precision in _NARROW and _NARROW[precision] not in found:
        shown = ", ".join(found.get("FLOAT", [])[:5])
        raise UnsupportedError(f"asked for a {precision} engine, and it was built to write float32 in {shown}")
    return {kind: len(names) for kind, names in sorted(found.items())}
