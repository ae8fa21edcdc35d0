"""Normalisation layers, and the table of them.

To add one: a file with the module classes (its formula in `lowprec.functional`), one line in `NORMS`, one float64
function in tests/reference_norm.py. Folding, export, held statistics and re-estimation follow from the base class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lowprec.norm.base import ScaleBatchNorm
from lowprec.norm.inference import inference_affine, is_norm
from lowprec.norm.l1 import L1BatchNorm1d, L1BatchNorm2d, L1BatchNorm3d
from lowprec.statistics import Kind, running_statistics

__all__ = [
    "NORMS",
    "Kind",
    "L1BatchNorm1d",
    "L1BatchNorm2d",
    "L1BatchNorm3d",
    "NormFamily",
    "ScaleBatchNorm",
    "inference_affine",
    "is_norm",
    "running_statistics",
]


@dataclass(frozen=True)
class NormFamily:
    """One normalisation in its three dimensions.

    Args:
        name: the name in configs.
        classes: the module class by number of spatial dimensions (1, 2, 3).
        summary: one sentence.
        source: where it was published.
    """

    name: str
    classes: Mapping[int, type[ScaleBatchNorm]]
    summary: str
    source: str


NORMS: dict[str, NormFamily] = {
    family.name: family
    for family in (
        NormFamily(
            "l1",
            {1: L1BatchNorm1d, 2: L1BatchNorm2d, 3: L1BatchNorm3d},
            "batch norm whose spread is sqrt(pi/2) times the mean absolute deviation",
            "Hoffer, Banner, Golan, Soudry, Norm matters, NeurIPS 2018",
        ),
    )
}
