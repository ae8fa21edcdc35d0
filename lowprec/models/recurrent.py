"""A recurrent classifier, which has no place for a batch norm: `bounded_weight_norm` is the method for it.

Source: Hochreiter, Schmidhuber, Long Short-Term Memory, Neural Computation 9(8), 1997; rows of an image as a sequence:
Le, Jaitly, Hinton, A Simple Way to Initialize Recurrent Networks of Rectified Linear Units, 2015.
"""

from __future__ import annotations

from torch import Tensor, nn


class LSTMClassifier(nn.Module):
    """An LSTM over the rows of an image, and a classifier on its last output."""

    def __init__(self, inputs: int, hidden: int, layers: int, classes: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, layers, batch_first=True)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, in_channels, rows, size)."""
        outputs, _ = self.lstm(x.transpose(1, 2).flatten(2))
        logits: Tensor = self.classifier(outputs[:, -1])
        return logits


def lstm(classes: int = 10, in_channels: int = 1, size: int = 8, hidden: int = 64, layers: int = 1) -> nn.Module:
    """An LSTM that reads an image row by row; with the defaults 20 thousand parameters, made for the 8x8 digits.

    A sequence of L steps of F features is an image (1, L, F). Its activations are the gates' own, and it has no norm.
    First weights as torch draws them.

    Args:
        classes: outputs.
        in_channels: channels of the images, read side by side.
        size: pixels of a row; any number of rows.
        hidden: width of the recurrent layers.
        layers: recurrent layers.
    """
    return LSTMClassifier(in_channels * size, hidden, layers, classes)
