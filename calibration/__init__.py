"""What data says about a trained network: exact running statistics, ranges of its tensors, half-precision headroom."""

if __name__ != "lowprec.calibration":
    raise ImportError("import lowprec.calibration, not calibration: this folder is a part of lowprec")

from lowprec.calibration.activations import Calibration, calibrate
from lowprec.calibration.reestimation import recompute_batch_stats

__all__ = ["Calibration", "calibrate", "recompute_batch_stats"]
