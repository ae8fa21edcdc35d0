"""Training from a config: the trainer, its config, and the folder of a run."""

from lowprec.train.augmentation import BatchAugmentation
from lowprec.train.config import Config, load_config, parse_config
from lowprec.train.factory import build_model, import_factory
from lowprec.train.run import is_run, load_run
from lowprec.train.trainer import Trainer, TrainResult

__all__ = [
    "BatchAugmentation",
    "Config",
    "TrainResult",
    "Trainer",
    "build_model",
    "import_factory",
    "is_run",
    "load_config",
    "load_run",
    "parse_config",
]
