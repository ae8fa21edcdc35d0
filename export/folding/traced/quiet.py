"""Keeps torch's exporters from writing to the terminal while they work.

They warn, log and print about their own internals (missing torchvision, symbolic shapes) on every call. What they
report that matters comes back as an exception, and is said again in one line by whoever called them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

# The loggers through which torch.export and torch.onnx report on themselves.
_LOGGERS = (
    "torch._subclasses.fake_tensor",
    "torch.export",
    "torch.fx.experimental.symbolic_shapes",
    "torch.onnx",
    "torch.onnx._internal.exporter._registration",
    "torch.onnx._internal.exporter._core",
    "onnxscript",
    "onnx_ir",
)


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silences warnings, the exporters' loggers and what they print, inside the block only."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
