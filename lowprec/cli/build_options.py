"""The options of an engine build, the same for `export` and `engine`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lowprec.errors import ConfigError

if TYPE_CHECKING:
    from lowprec.export.backends import BuildOptions
    from lowprec.export.backends.base import Shapes

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds them as a group of their own."""
    group = parser.add_argument_group("engines", "what they are built for; precision is what the ONNX file says")
    group.add_argument("--batch", metavar="MIN:OPT:MAX", help="sizes of a free batch (default: 1:16:256)")
    group.add_argument(
        "--profile",
        nargs="+",
        action="append",
        metavar="INPUT=MIN:OPT:MAX",
        help="shapes of inputs, as image=1x3x224x224:8x3x224x224:32x3x448x448; once per optimisation profile",
    )
    group.add_argument("--builder-level", type=int, metavar="N", help="how long to search, 0 to 5")
    group.add_argument("--workspace", metavar="SIZE", help="scratch memory to plan with, as 512M or 2G")
    group.add_argument(
        "--timing-cache", type=Path, metavar="FILE", help="pins the builder's choices: written if absent, else obeyed"
    )
    group.add_argument("--version-compatible", action="store_true", help="newer versions of the library may load it")
    group.add_argument(
        "--hardware-compatible",
        choices=("same", "ampere+"),
        help="GPUs of the same compute capability, or from Ampere on",
    )
    group.add_argument("--refittable", action="store_true", help="weights can be exchanged later")
    group.add_argument("--stripped", action="store_true", help="leave the weights out")
    group.add_argument("--weight-streaming", action="store_true", help="weights may stay in host memory")
    group.add_argument("--tf32", action="store_true", help="float32 products may be computed in TF32")
    group.add_argument(
        "--compute-capability", nargs="+", metavar="X.Y", help="GPUs to build for (tensorrt-rtx), as 8.6 12.0"
    )


def build_options_from(args: argparse.Namespace) -> BuildOptions:
    """The options; raises `ConfigError` where one cannot be read."""
    from lowprec.export.backends import BuildOptions

    profiles = tuple(dict(map(_profile, words)) for words in args.profile or ())
    return BuildOptions(
        batch=(1, 16, 256) if args.batch is None else _batch(args.batch),
        profiles=profiles,
        builder_level=args.builder_level,
        workspace=None if args.workspace is None else _size(args.workspace),
        timing_cache=args.timing_cache,
        version_compatible=args.version_compatible,
        hardware_compatible=args.hardware_compatible,
        refittable=args.refittable,
        stripped=args.stripped,
        weight_streaming=args.weight_streaming,
        tf32=args.tf32,
        compute_capabilities=tuple(map(_capability, args.compute_capability or ())),
    )


def _batch(text: str) -> tuple[int, int, int]:
    found = re.fullmatch(r"(\d+):(\d+):(\d+)", text)
    if found is None:
        raise ConfigError(f"--batch takes MIN:OPT:MAX, as 1:16:256; found {text!r}")
    return int(found[1]), int(found[2]), int(found[3])


def _profile(text: str) -> tuple[str, Shapes]:
    shape = r"(\d+(?:x\d+)*)"
    found = re.fullmatch(rf"(.+)={shape}:{shape}:{shape}", text)
    if found is None:
        raise ConfigError(f"--profile takes INPUT=MIN:OPT:MAX, as image=1x3x8x8:4x3x8x8:8x3x8x8; found {text!r}")
    low, likely, high = (tuple(map(int, found[index].split("x"))) for index in (2, 3, 4))
    return found[1], (low, likely, high)


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+)([KMG]?)", text.upper())
    if found is None:
        raise ConfigError(f"--workspace takes a number of bytes, as 512M or 2G; found {text!r}")
    return int(found[1]) * _UNITS[found[2]]


def _capability(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)\.(\d)", text)
    if found is None:
        raise ConfigError(f"--compute-capability takes numbers such as 8.6; found {text!r}")
    return int(found[1]), int(found[2])
