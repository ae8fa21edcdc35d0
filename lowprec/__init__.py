"""lowprec: train networks that survive half precision, ship them folded, prove that nothing changed on the way.

Importing this package loads neither torch nor onnx: public names resolve on first use, so that `lowprec doctor`,
`lowprec inspect` and `lowprec verify` also run on a machine that has no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowprec.lazy import resolver

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lowprec.affine import ChannelAffine
    from lowprec.methods import METHODS, attach, convert
    from lowprec.norm import NORMS, inference_affine
    from lowprec.precision import Precision
    from lowprec.train import Trainer

__all__ = ["METHODS", "NORMS", "ChannelAffine", "Precision", "Trainer", "attach", "convert", "inference_affine"]

_HOME = {
    "ChannelAffine": "lowprec.affine",
    "METHODS": "lowprec.methods",
    "NORMS": "lowprec.norm",
    "Precision": "lowprec.precision",
    "Trainer": "lowprec.train",
    "attach": "lowprec.methods",
    "convert": "lowprec.methods",
    "inference_affine": "lowprec.norm",
}


__getattr__ = resolver(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
