"""Precision modes: half arithmetic, float32 masters, a loss scale with a floor."""

from lowprec.precision.engine import Precision
from lowprec.precision.hooks import without_half_hooks
from lowprec.precision.masters import master_of
from lowprec.precision.modes import MODES, Mode

__all__ = ["MODES", "Mode", "Precision", "master_of", "without_half_hooks"]
