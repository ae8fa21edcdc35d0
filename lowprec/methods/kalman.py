"""The method `kalman`: batch norms become Kalman batch norms, and moments flow from one to the next.

For batches of a few samples, whose own moments say little: the more samples, the less a norm keeps of what the layers
before it predict. Evaluation, folding and export are those of batch norm.
"""

from __future__ import annotations

from torch import nn

from lowprec.methods.replace_norm import replace_norms
from lowprec.norm.kalman import KalmanBatchNorm
from lowprec.norm.moment_flow import FlowHooks
from lowprec.report import ChangeReport


def convert_kalman(
    model: nn.Module,
    report: ChangeReport,
    *,
    variant: str = "output",
    gain: float | None = None,
    deterministic: bool = True,
    guard: float = 100.0,
) -> nn.Module:
    """Replaces torch's batch norms, keeping their parameters and statistics, and opens a flow around training forwards.

    Args:
        model: a private copy.
        report: gets a row per norm that was replaced or left alone.
        variant: how a norm predicts, a name in `lowprec.norm.kalman.VARIANTS`.
        gain: the share of the batch's own moments; None to let it follow the number of samples, from the released
            code's 0.1 at 2 to its 0.95 at 128.
        deterministic: predictions in closed form, not from noise.
        guard: see `KalmanBatchNorm`.

    Raises:
        ConfigError: an unknown variant, or numbers out of range.
        UnsupportedError: there is no batch norm to replace.
    """
    options = {"variant": variant, "gain": gain, "deterministic": deterministic, "guard": guard}
    model = replace_norms(model, report, "kalman", "kalman", None, "tree", fuse=False, **options)
    flow = FlowHooks()
    flow.install(model)
    for module in model.modules():
        if isinstance(module, KalmanBatchNorm):
            module.flow = flow
    return model
