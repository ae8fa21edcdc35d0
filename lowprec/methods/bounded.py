"""The method `bounded_weight_norm`: the weight rows of conv and linear layers get a fixed norm.

Norm layers stay where they are: with bounded weights another method may thin them out (to mean-only norms), and a
network that has none trains as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.methods.method import nearest_hint
from lowprec.methods.rewrite import modules_with_paths
from lowprec.parametrize import register_bounded_weight_norm, why_not_bounded, zero_rows
from lowprec.report import ChangeReport


def convert_bounded_weight_norm(model: nn.Module, report: ChangeReport, *, skip: Sequence[str] = ()) -> nn.Module:
    """Parametrises the weight of every linear and conv layer by `lowprec.parametrize.BoundedWeightNorm`.

    A bounded classifier has bounded logits, so its loss has a floor; name it in `skip` to let it grow.

    Args:
        model: a private copy.
        report: gets a row per layer.
        skip: module paths to leave as they are, such as the classifier's.

    Raises:
        ConfigError: a path in `skip` is not a module of the model.
        UnsupportedError: no layer could be parametrised.
    """
    skipped = _skipped_modules(model, skip)
    for path, module in list(modules_with_paths(model)):
        if not isinstance(module, (nn.Linear, _ConvNd)):
            continue
        reason = "left out by skip" if module in skipped else why_not_bounded(module)
        if reason is not None:
            report.refuse(path, reason)
            continue
        zeros = zero_rows(module)
        rho = register_bounded_weight_norm(module)
        rest = f"; {zeros} rows of zeros stay zero until their gradient moves them" if zeros else ""
        report.change(path, f"every weight row has norm {float(rho):.6g}{rest}")
    if not report.changed:
        found = f": {report.refused[0].name}: {report.refused[0].reason}" if report.refused else ""
        raise UnsupportedError(
            f"method 'bounded_weight_norm' found no linear or conv layer to bound in {type(model).__name__}{found}"
        )
    return model


def _skipped_modules(model: nn.Module, skip: Sequence[str]) -> set[nn.Module]:
    paths = dict(model.named_modules(remove_duplicate=False))
    if isinstance(skip, str):
        raise ConfigError(f"skip is a list of module paths; write skip = [{skip!r}]")
    for path in skip:
        if path not in paths:
            raise ConfigError(f"skip names {path!r}, which is not a module of the model{nearest_hint(path, paths)}")
    return {paths[path] for path in skip}
