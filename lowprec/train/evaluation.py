"""Loss and accuracy of a classifier on samples."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lowprec.data import Samples
from lowprec.train.network import batch_of, logits_of


@torch.no_grad()
def evaluate(model: nn.Module, samples: Samples, batch_size: int, device: torch.device) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of `model` on `samples`, in evaluation mode; the mode is given back."""
    was_training = model.training
    model.eval()
    loss, correct = 0.0, 0
    try:
        for start in range(0, len(samples), batch_size):
            index = np.arange(start, min(start + batch_size, len(samples)))
            inputs, labels = batch_of(samples, index, device)
            logits = logits_of(model, inputs, labels).float()
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            correct += int((logits.argmax(1) == labels).sum())
    finally:
        model.train(was_training)
    return loss / len(samples), correct / len(samples)
