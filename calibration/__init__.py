"""What data says about a trained network: exact running statistics, ranges of its tensors, half-precision headroom.

Names resolve on first use: the record that an ONNX file's ranges go into needs no torch.
"""

from __future__ import annotations

if __name__ != "lowprec.calibration":
    raise ImportError("import lowprec.calibration, not calibration: this folder is a part of lowprec")

from typing import TYPE_CHECKING

from lowprec.lazy import resolver

if TYPE_CHECKING:
    from lowprec.calibration.activations import calibrate
    from lowprec.calibration.record import Calibration
    from lowprec.calibration.reestimation import recompute_batch_stats

__all__ = ["Calibration", "calibrate", "recompute_batch_stats"]

_HOME = {
    "Calibration": "lowprec.calibration.record",
    "calibrate": "lowprec.calibration.activations",
    "recompute_batch_stats": "lowprec.calibration.reestimation",
}


__getattr__ = resolver(__name__, _HOME)
