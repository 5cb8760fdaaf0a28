"""Training with transformers' Trainer: sample ids flow from the data set to the masks, losses and logs come by themselves."""

from .loader import Loader
from .sample_ids import SAMPLE_ID, SampleIdCollator, WithSampleIds
from .trainer import HiddenKeyTrainer, HiddenKeyTrainerMixin

__all__ = ["SAMPLE_ID", "HiddenKeyTrainer", "HiddenKeyTrainerMixin", "Loader", "SampleIdCollator", "WithSampleIds"]
