"""`lowprec inspect`: what a file, a bundle or a run is, what was folded and what not, and how much room half leaves."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from lowprec.cli.terminal import print_json, print_table, say
from lowprec.errors import ArtifactError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lowprec inspect`."""
    parser.add_argument("path", help="a bundle or run folder, an .onnx file, or an .npz file")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Prints what the path is."""
    facts = examine(Path(args.path))
    if args.json:
        print_json(facts)
        return 0
    say(f"{args.path}: {facts['kind']}")
    for key, value in facts.items():
        if key == "kind":
            continue
        if isinstance(value, list):
            _print_rows(key, value)
        else:
            say(f"{key.replace('_', ' ')}: {value}")
    return 0


def _print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        headers = list(rows[0])
        print_table(headers, [[str(row[name]) for name in headers] for row in rows], title.replace("_", " "))


def examine(path: Path) -> dict[str, Any]:
    """Facts about a path as plain data; raises `ArtifactError` for what it does not know."""
    if path.is_dir():
        if (path / "manifest.json").exists():
            return _bundle(path)
        if (path / "config.toml").exists():
            return _run(path)
        raise ArtifactError(f"{path} is neither a bundle (no manifest.json) nor a run (no config.toml)")
    if not path.exists():
        raise ArtifactError(f"nothing to inspect at {path}: no such file or folder")
    if path.suffix == ".onnx":
        return _onnx(path)
    if path.suffix == ".npz":
        return _npz(path)
    raise ArtifactError(f"inspect does not know files like {path.name}; give a bundle, a run, an .onnx or an .npz")


def _bundle(path: Path) -> dict[str, Any]:
    from lowprec.export.bundle import CALIBRATION, open_bundle

    bundle = open_bundle(path)
    origin = bundle.manifest.get("provenance") or {}
    facts: dict[str, Any] = {
        "kind": "bundle, every file matches its SHA-256",
        "manifest_sha256": bundle.manifest_sha256,
        **{key: origin.get(key) for key in ("source", "created", "lowprec", "git_commit", "data", "data_fingerprint")},
        "artefacts": ", ".join([*bundle.onnx_artefacts.values(), *bundle.engines]),
        "parity_when_made": bundle.parity.verdict,
        "folded": [{"place": row.name, "how": row.reason} for row in bundle.fold_report.changed],
        "not_folded": [{"place": row.name, "why": row.reason} for row in bundle.fold_report.refused],
        "fold_error_in_float64": bundle.fold_report.facts.get("float64_error"),
    }
    if CALIBRATION in bundle.files:
        try:
            facts["fp16_headroom"] = _headroom(bundle.record(CALIBRATION))
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path / CALIBRATION} is damaged: {error!r}") from None
    return facts


def _headroom(calibration: dict[str, Any]) -> list[dict[str, Any]]:
    """Ranges of inputs, layer outputs and weights, the largest first."""
    ranges = {f"{kind} {name}": r for kind in ("inputs", "outputs", "weights") for name, r in calibration[kind].items()}
    return [
        {"tensor": name, "absmax": f"{found['absmax']:.4g}", "headroom in bits": bits_text(found["fp16_headroom_bits"])}
        for name, found in sorted(ranges.items(), key=lambda item: -item[1]["absmax"])
    ]


def bits_text(bits: float | None) -> str:
    """Headroom for people; a tensor of zeros has no bound."""
    return "unbounded" if bits is None else f"{bits:.1f}"


def _run(path: Path) -> dict[str, Any]:
    from lowprec.train import load_run
    from lowprec.train.log import METRICS

    module, config = load_run(path)
    metrics = [json.loads(line) for line in (path / METRICS).read_text(encoding="utf-8").splitlines()]
    return {
        "kind": "run",
        "model": config.model.factory,
        "method": config.method.name,
        "precision": config.precision.mode,
        "data": config.data.source,
        "parameters": sum(p.numel() for p in module.parameters()),
        "last_metrics": ", ".join(f"{name} {value}" for name, value in (metrics[-1] if metrics else {}).items()),
    }


def _onnx(path: Path) -> dict[str, Any]:
    from onnx import TensorProto

    from lowprec.export.external_data import array_of
    from lowprec.export.onnx_files import load_onnx
    from lowprec.formats import FP16, rounding_loss

    model = load_onnx(path)
    types = Counter(TensorProto.DataType.Name(tensor.data_type).lower() for tensor in model.graph.initializer)
    troubles = []
    for tensor in model.graph.initializer:
        array = array_of(tensor)
        if array.dtype.kind != "f" or array.size == 0:
            continue
        loss = rounding_loss(array, FP16)
        if loss:
            troubles.append({"weight": tensor.name, "overflow": loss.overflow, "vanish": loss.vanished,
                             "turn subnormal": loss.subnormal, "of": array.size})  # fmt: skip
    return {
        "kind": "ONNX model",
        "opset": ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import),
        "inputs": ", ".join(_signature(value) for value in model.graph.input),
        "outputs": ", ".join(_signature(value) for value in model.graph.output),
        "nodes": ", ".join(
            f"{count} {name}" for name, count in Counter(n.op_type for n in model.graph.node).most_common()
        ),
        "weights": ", ".join(f"{count} {name}" for name, count in types.most_common()),
        "norms_left": sum("Normalization" in node.op_type for node in model.graph.node),
        "weights_that_half_would_damage": troubles,
    }


def _signature(value: Any) -> str:
    from onnx import TensorProto

    tensor = value.type.tensor_type
    shape = [d.dim_param or str(d.dim_value) for d in tensor.shape.dim]
    return f"{value.name}: {TensorProto.DataType.Name(tensor.elem_type).lower()}({', '.join(shape)})"


def _npz(path: Path) -> dict[str, Any]:
    from lowprec.artifacts import read_npz

    arrays = read_npz(path, "the file")
    rows = []
    for name, array in sorted(arrays.items()):
        numeric = array.dtype.kind in "fiu" and array.size
        largest = float(abs(array.astype("float64")).max()) if numeric else math.nan
        rows.append({"array": name, "type": str(array.dtype), "shape": str(array.shape), "absmax": f"{largest:.4g}"})
    return {"kind": ".npz arrays", "arrays": rows}
