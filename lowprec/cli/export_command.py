"""`lowprec export`: from a trained model to a bundle. An .onnx file takes the way where torch is absent."""

from __future__ import annotations

import argparse

from lowprec.cli import parity_table
from lowprec.cli.build_options import add_build_arguments, build_options_from
from lowprec.cli.free_axes import free_axes
from lowprec.cli.terminal import note, progress, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lowprec export`."""
    parser.add_argument(
        "model", help="a run folder, MODULE:FACTORY importable from the current folder, or a float32 .onnx file"
    )
    parser.add_argument("-o", "--output", required=True, metavar="BUNDLE", help="bundle folder to write")
    parser.add_argument(
        "--precision",
        nargs="+",
        action="extend",
        metavar="P",
        help="fp32, fp16, bf16, mixed, int8 (default: fp16; fp32 is always written)",
    )
    parser.add_argument(
        "--keep",
        nargs="+",
        action="extend",
        metavar="WHAT",
        help="nodes that stay float32: op:Softmax, module:head.*, node:NAME, or a keep-list.json "
        "(default: none; in mixed and int8 what half precision hurts most)",
    )
    parser.add_argument(
        "--narrow-io",
        nargs="*",
        metavar="NAME",
        help="inputs and outputs that are half where the artefact is; without names all of them (default: none)",
    )
    parser.add_argument(
        "--target", nargs="+", action="extend", metavar="T", help="onnx, tensorrt-rtx, tensorrt (default: onnx)"
    )
    parser.add_argument(
        "--calibration",
        metavar="DATA",
        help="digits, an .npz, a folder of images or of CIFAR, tar shards (default: the run's own data; for an .onnx "
        "file random inputs, of which int8 is not made)",
    )
    parser.add_argument(
        "--dynamic",
        nargs="+",
        action="extend",
        metavar="INPUT:AXES",
        help="free axes of a module's inputs, as image:0=batch,2=height,3=2*height (default: a free batch on axis 0)",
    )
    parser.add_argument(
        "--opset", type=int, metavar="N", help="ONNX operator set (default: 20 for a module, a file's own for a file)"
    )
    parser.add_argument("--json", action="store_true", help="print the parity report as one JSON document")
    add_build_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Exports, prints the waterfall, and returns 1 when parity does not hold."""
    from lowprec.export.pipeline import export
    from lowprec.export.sources import open_model, samples_or_none

    source = open_model(args.model)
    samples = samples_or_none(args.calibration or source.data, split="test" if source.data else "all")
    with progress("export") as report_progress:
        bundle = export(
            source.model,
            source.inputs_for(samples),
            args.output,
            precision=args.precision or ["fp16"],
            targets=args.target or ["onnx"],
            calibration=samples,
            dynamic_shapes=free_axes(args.dynamic),
            opset=args.opset,
            keep=args.keep,
            narrow_io=args.narrow_io or args.narrow_io is not None,
            build=build_options_from(args),
            facts={"source": source.name, **source.facts},
            progress=report_progress,
        )
    status = parity_table.show(bundle.parity, as_json=args.json)
    (say if not args.json else note)(f"bundle: {bundle.folder} (manifest SHA-256 {bundle.manifest_sha256})")
    return status
