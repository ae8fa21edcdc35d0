"""Methods that change how a whole network is trained: the table, `convert` and `attach`.

To add one: a file with its functions, one line in `METHODS`, one case in tests/test_methods.py.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.methods.agc import attach_agc
from lowprec.methods.bn_free_binary import attach_bn_free_binary, convert_bn_free_binary
from lowprec.methods.bnp import attach_bnp, convert_bnp
from lowprec.methods.bounded import attach_bounded_weight_norm, convert_bounded_weight_norm
from lowprec.methods.frn import convert_frn
from lowprec.methods.ic import convert_ic
from lowprec.methods.kalman import convert_kalman
from lowprec.methods.mean_only import convert_mean_only
from lowprec.methods.method import Handle, Method, check_options, nearest_hint, options_of
from lowprec.methods.mimic_norm import attach_mimic_norm, convert_mimic_norm
from lowprec.methods.norm_record import NormRecord
from lowprec.methods.norm_schedule import attach_norm_schedule
from lowprec.methods.one_batch_norm import convert_one_batch_norm
from lowprec.methods.recording import Recorder, record_norms
from lowprec.methods.replace_norm import convert_l1, convert_l2_half, convert_linf, convert_topk
from lowprec.methods.scaled_ws import convert_scaled_ws
from lowprec.methods.wd_mimic import attach_wd_mimic
from lowprec.methods.weight_norm_lp import attach_weight_norm_lp, convert_weight_norm_lp
from lowprec.report import ChangeReport

__all__ = ["METHODS", "Handle", "Method", "NormRecord", "Recorder", "attach", "convert", "record_norms"]

_NORM_MATTERS = "Hoffer, Banner, Golan, Soudry, Norm matters, NeurIPS 2018"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("l1", "module", "batch norms become L1 batch norms", _NORM_MATTERS, convert_l1),
        Method("linf", "module", "batch norms become L-infinity batch norms", _NORM_MATTERS, convert_linf),
        Method(
            "topk",
            "module",
            "batch norms become batch norms over the k largest deviations",
            _NORM_MATTERS,
            convert_topk,
        ),
        Method(
            "l2_half",
            "module",
            "batch norms keep their formula, with statistics in true half arithmetic",
            _NORM_MATTERS,
            convert_l2_half,
        ),
        Method(
            "bounded_weight_norm",
            "module",
            "every row of the weights has one fixed norm per layer",
            _NORM_MATTERS,
            convert_bounded_weight_norm,
            attach_bounded_weight_norm,
        ),
        Method(
            "weight_norm_lp",
            "module",
            "every row of the weights has one fixed 1-norm, maximum or top-k norm per layer",
            _NORM_MATTERS,
            convert_weight_norm_lp,
            attach_weight_norm_lp,
        ),
        Method(
            "mean_only",
            "module",
            "batch norms take off the mean and divide by nothing; for weights of fixed norm",
            _NORM_MATTERS,
            convert_mean_only,
        ),
        Method(
            "mimic_norm",
            "module",
            "no batch norm but one on the logits; conv weights are centred after every step",
            "Fei, Dai, Li, Zou, Xiong, MimicNorm, arXiv 2010.09278",
            convert_mimic_norm,
            attach_mimic_norm,
        ),
        Method(
            "one_batch_norm",
            "module",
            "fixed scales in place of all norms, one batch norm before the head, and a head that bypasses it",
            "KataGo, One Batch Norm and fixed variance initialisation, docs/KataGoMethods.md",
            convert_one_batch_norm,
        ),
        Method(
            "bnp",
            "module",
            "no batch norm; gradients are preconditioned as if there were one before every layer",
            "Lange, Helfrich, Ye, Batch Normalization Preconditioning, JMLR 2022",
            convert_bnp,
            attach_bnp,
        ),
        Method(
            "kalman",
            "module",
            "batch norms mix their moments with what the layers before them predict, for batches of a few samples",
            "Wang, Peng, Luo, Wang, Lin, Batch Kalman Normalization, arXiv 1802.03133",
            convert_kalman,
        ),
        Method(
            "scaled_ws",
            "module",
            "no batch norm; weights are standardised and hold the constants of a normaliser-free network",
            "Brock, De, Smith, Simonyan, arXiv 2101.08692 and 2102.06171",
            convert_scaled_ws,
        ),
        Method(
            "bn_free_binary",
            "module",
            "no batch norm; inner convolutions have binary weights and inputs, gradients are clipped adaptively",
            'Chen, Zhang, Ouyang, Liu, Shen, Wang, "BNN - BN = ?", arXiv 2104.08215',
            convert_bn_free_binary,
            attach_bn_free_binary,
        ),
        Method(
            "agc",
            "step",
            "gradients are clipped per output channel, in proportion to its weights",
            "Brock, De, Smith, Simonyan, High-performance large-scale image recognition, arXiv 2102.06171",
            attach=attach_agc,
        ),
        Method(
            "ic",
            "module",
            "batch norm and dropout before every weight layer, in place of batch norm after it",
            "Chen et al., Rethinking the Usage of Batch Normalization and Dropout, arXiv 1905.05928",
            convert_ic,
        ),
        Method(
            "frn",
            "module",
            "batch norms divide each map by its own root mean square, and learned thresholds stand for the ReLUs",
            "Singh, Krishnan, Filter Response Normalization Layer, CVPR 2020",
            convert_frn,
        ),
        Method(
            "wd_mimic",
            "step",
            "no weight decay: every step is corrected to the weight norms recorded in a run that had it",
            _NORM_MATTERS,
            attach=attach_wd_mimic,
        ),
        Method(
            "norm_schedule",
            "step",
            "weight norms grow on a schedule instead of a learning rate that falls",
            _NORM_MATTERS,
            attach=attach_norm_schedule,
        ),
        Method(
            "batch_augmentation",
            "data",
            "every batch holds several copies of its samples, each augmented by itself",
            "Hoffer, Ben-Nun, Hubara, Giladi, Hoefler, Soudry, Augment Your Batch, CVPR 2020",
            instead="set [data] copies and augment, or use lowprec.train.BatchAugmentation in a loop of your own",
        ),
    )
}

# The attribute of a converted model that lists what was done to it: [{"name": ..., "args": {...}}, ...].
_RECORD = "lowprec_methods"


def convert(model: nn.Module, name: str, **args: Any) -> tuple[nn.Module, ChangeReport]:
    """Applies the method `name` to a copy of `model`; the argument stays as it is.

    Options of the method's `attach` may be given here too; `attach` then takes them from the copy.

    The copy keeps hooks, dtype, device, training flags, shared modules and the state_dict keys that mean the same, and
    records name and arguments for `attach`. Make the optimizer from the copy's parameters.

    Returns:
        the new model and a report with a row for every place that was changed or left alone.

    Raises:
        ConfigError: no such method or option.
        UnsupportedError: the method finds nothing to convert, or acts on the data and not on a network.
    """
    method = _method_named(name)
    if method.kind == "data":
        raise UnsupportedError(f"method {name!r} acts on the data, not on a network; {method.instead}")
    own = options_of(method.convert)
    check_options(method, args, list(dict.fromkeys([*own, *options_of(method.attach)])))
    report = ChangeReport()
    converted = _copy_of(model)
    if method.convert is not None:
        converted = method.convert(converted, report, **{name: args[name] for name in args if name in own})
    else:
        report.change("(model)", "is unchanged; attach(model, optimizer) makes the method act")
    record = {"name": name, "args": deepcopy(args)}
    setattr(converted, _RECORD, [*getattr(model, _RECORD, []), record])
    return converted, report


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, method: str | None = None, **args: Any) -> Handle:
    """Puts on what the methods of `model` need around an optimizer step; `handle.remove()` takes it off.

    Reads what `convert` recorded; with `method` only that one, or a step method that needs no conversion. May come
    before or after `Precision.prepare`. Where nothing is needed the handle is inert.

    Args:
        model: a converted model.
        optimizer: made from its parameters.
        method: a name in `METHODS`, or None for all that are recorded.
        args: options, instead of the recorded ones.

    Raises:
        ConfigError: no such method or option, the model was not converted by `method`, or the optimizer does not hold
            the parameters that the method acts on.
    """
    recorded = {record["name"]: record["args"] for record in getattr(model, _RECORD, [])}
    if method is not None:
        entries = [_method_to_attach(method, recorded)]
    else:
        entries = [_method_named(name) for name in recorded if _method_named(name).attach is not None]
        if args and len(entries) != 1:
            raise ConfigError(f"attach got options {', '.join(args)} but no method to give them to; name the method")
    handles = []
    for entry in entries:
        valid = options_of(entry.attach)
        check_options(entry, args, valid)
        options = {name: value for name, value in recorded.get(entry.name, {}).items() if name in valid} | args
        if entry.attach is not None:
            handles.append(entry.attach(model, optimizer, **options))
    return handles[0] if len(handles) == 1 else Handle([handle.remove for handle in handles])


def _copy_of(model: nn.Module) -> nn.Module:
    # A process group cannot be copied and need not be: it is the connection, not state of the model.
    groups = (getattr(module, "process_group", None) for module in model.modules())
    memo = {id(group): group for group in groups if group is not None}
    try:
        return deepcopy(model, memo)
    except (RuntimeError, TypeError, ValueError) as error:
        lazy = any(isinstance(value, nn.UninitializedBuffer) for value in model.buffers())
        advice = "run one batch through the model first" if lazy else "remove what deepcopy refuses"
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedError(
            f"convert works on a copy, but {type(model).__name__} has none: {reason}; {advice}"
        ) from None


def _method_named(name: str) -> Method:
    if name not in METHODS:
        hint = nearest_hint(name, METHODS)
        raise ConfigError(f"no method is called {name!r}; choose one of {', '.join(METHODS)}{hint}")
    return METHODS[name]


def _method_to_attach(name: str, recorded: dict[str, Any]) -> Method:
    method = _method_named(name)
    if method.kind == "data":
        raise UnsupportedError(f"method {name!r} acts on the data, not on an optimizer; {method.instead}")
    if method.kind == "module" and name not in recorded:
        raise ConfigError(
            f"attach: the model was not converted by {name!r}; call lowprec.convert(model, {name!r}) first"
        )
    return method
