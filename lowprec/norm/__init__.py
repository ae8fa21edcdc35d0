"""Normalisation layers, and the table of them.

To add one: a file with the module classes (its formula in `lowprec.functional`), one line in `NORMS`, one float64
function in tests/reference_norm.py. Folding, export, held statistics and re-estimation follow from the base class:
`AbsoluteBatchNorm` for a scale of absolute deviations, `ScaleBatchNorm` for what keeps another statistic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lowprec.norm.absolute import AbsoluteBatchNorm
from lowprec.norm.base import ScaleBatchNorm
from lowprec.norm.filter_response import FilterResponseNorm
from lowprec.norm.inference import inference_affine, is_norm
from lowprec.norm.kalman import KalmanBatchNorm1d, KalmanBatchNorm2d, KalmanBatchNorm3d
from lowprec.norm.l1 import L1BatchNorm1d, L1BatchNorm2d, L1BatchNorm3d
from lowprec.norm.l2 import L2BatchNorm1d, L2BatchNorm2d, L2BatchNorm3d
from lowprec.norm.mean_only import MeanOnlyBatchNorm1d, MeanOnlyBatchNorm2d, MeanOnlyBatchNorm3d
from lowprec.norm.sync import (
    SyncKalmanBatchNorm,
    SyncL1BatchNorm,
    SyncL2BatchNorm,
    SyncLInfBatchNorm,
    SyncTopKBatchNorm,
)
from lowprec.norm.topk import (
    LInfBatchNorm1d,
    LInfBatchNorm2d,
    LInfBatchNorm3d,
    TopKBatchNorm1d,
    TopKBatchNorm2d,
    TopKBatchNorm3d,
)
from lowprec.statistics import Kind, running_statistics

__all__ = [
    "NORMS",
    "AbsoluteBatchNorm",
    "FilterResponseNorm",
    "KalmanBatchNorm1d",
    "KalmanBatchNorm2d",
    "KalmanBatchNorm3d",
    "Kind",
    "L1BatchNorm1d",
    "L1BatchNorm2d",
    "L1BatchNorm3d",
    "L2BatchNorm1d",
    "L2BatchNorm2d",
    "L2BatchNorm3d",
    "LInfBatchNorm1d",
    "LInfBatchNorm2d",
    "LInfBatchNorm3d",
    "MeanOnlyBatchNorm1d",
    "MeanOnlyBatchNorm2d",
    "MeanOnlyBatchNorm3d",
    "NormFamily",
    "ScaleBatchNorm",
    "SyncKalmanBatchNorm",
    "SyncL1BatchNorm",
    "SyncL2BatchNorm",
    "SyncLInfBatchNorm",
    "SyncTopKBatchNorm",
    "TopKBatchNorm1d",
    "TopKBatchNorm2d",
    "TopKBatchNorm3d",
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
        NormFamily(
            "linf",
            {1: LInfBatchNorm1d, 2: LInfBatchNorm2d, 3: LInfBatchNorm3d},
            "batch norm whose spread is a constant of n times the largest absolute deviation",
            "Hoffer, Banner, Golan, Soudry, Norm matters, NeurIPS 2018",
        ),
        NormFamily(
            "topk",
            {1: TopKBatchNorm1d, 2: TopKBatchNorm2d, 3: TopKBatchNorm3d},
            "batch norm whose spread is a constant of n times the mean of the k largest absolute deviations",
            "Hoffer, Banner, Golan, Soudry, Norm matters, NeurIPS 2018",
        ),
        NormFamily(
            "l2",
            {1: L2BatchNorm1d, 2: L2BatchNorm2d, 3: L2BatchNorm3d},
            "batch norm as torch has it, able to keep its statistics in true half",
            "Ioffe, Szegedy, Batch Normalization, ICML 2015",
        ),
    )
}
