"""Every error a user can meet.

A message says what was asked, what was found and what to do. The command line prints the message alone and leaves with
`exit_code`: 1 parity fails or a check says no, 2 unusable input, 3 something asked for by name is not available here.
"""


class LowprecError(Exception):
    """Base of all errors that lowprec raises on purpose."""

    exit_code = 2


class UnsupportedError(LowprecError):
    """What was asked is outside what the library does; the message names the nearest thing that it does."""


class NoKernelError(UnsupportedError):
    """A backend lacks an operator in an element type: it says nothing against the artefact."""


class ConfigError(LowprecError):
    """A config, an option or a name in a table is wrong."""


class DataError(LowprecError):
    """Samples are missing, of the wrong shape or type, or not finite."""


class ArtifactError(LowprecError):
    """A file or folder is missing, truncated, tampered with, or is something else than it should be."""


class FoldError(LowprecError):
    """A network cannot be traced or folded."""


class ScaleFloorError(LowprecError):
    """The loss scale reached its floor and gradients still overflow; the message names the layer."""

    exit_code = 1


class ParityError(LowprecError):
    """Two models, or a bundle and its reference, are not the same within the stated limits."""

    exit_code = 1


class NeedsMoreSamplesError(LowprecError):
    """A claim was asked for that this many samples cannot decide."""

    exit_code = 3


class MissingDependencyError(LowprecError):
    """An optional package or device that was asked for by name is not here; the message says what to install."""

    exit_code = 3
