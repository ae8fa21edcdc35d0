"""Batch augmentation: every batch holds M copies of its samples, each augmented by itself.

The gradient of a step averages over B * M images of B samples, so that it has less variance for the same epochs: steps
per epoch and learning rate stay (the gradients of copies are correlated, so there is no linear scaling to make).

Copies come whole batch after whole batch (a b c, a b c, ...), not sample after sample. Any run of B images then shows
each sample once at most, and a longer one each as often as any other. So wherever such a batch is cut up, into
micro-batches, ghost groups or processes, no part normalises a sample by its own copies if that can be helped.

The augmentations are pure functions of images and of one row of uniform numbers for each: all image inputs of a sample
are moved alike, and a run that is resumed, which seeds its generators for each step, draws the same.

Axes: N sample, C channel, H and W of an image.

Source: Hoffer, Ben-Nun, Hubara, Giladi, Hoefler, Soudry, Augment Your Batch, CVPR 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowprec.errors import ConfigError, DataError
from lowprec.methods.method import nearest_hint

Inputs = dict[str | None, Tensor]
"""The inputs of a batch by name; the key is None where a single input has no name."""

Augmentation = Callable[[Tensor, Tensor], Tensor]
"""augmentation(x_NCHW, draws_N2): images from images and from two numbers of [0, 1) for each."""


def random_crop(x_NCHW: Tensor, draws_N2: Tensor) -> Tensor:
    """Pads an image by an eighth of its sides with zeros, and cuts its own size out of that at a place drawn.

    Source: He et al., Deep Residual Learning, CVPR 2016: 4 pixels on CIFAR's 32.
    """
    for axis, draw_N in zip((2, 3), draws_N2.unbind(1), strict=True):
        side = x_NCHW.shape[axis]
        padding = -(-side // 8)
        shift_N = (draw_N * (2 * padding + 1)).long() - padding
        source_NS = torch.arange(side, device=x_NCHW.device) + shift_N[:, None]
        shape = [len(x_NCHW), 1, 1, 1]
        shape[axis] = side
        inside = ((source_NS >= 0) & (source_NS < side)).reshape(shape)
        index = source_NS.clamp(0, side - 1).reshape(shape).expand_as(x_NCHW)
        x_NCHW = x_NCHW.gather(axis, index).masked_fill(~inside, 0)
    return x_NCHW


def random_flip(x_NCHW: Tensor, draws_N2: Tensor) -> Tensor:
    """Mirrors half of the images left to right."""
    return torch.where(draws_N2[:, 0].reshape(-1, 1, 1, 1) < 0.5, x_NCHW.flip(3), x_NCHW)


def cutout(x_NCHW: Tensor, draws_N2: Tensor) -> Tensor:
    """Sets a box of half the sides to zero, centred on a pixel drawn; at the border part of it is outside.

    Source: DeVries, Taylor, Improved Regularization with Cutout, arXiv 1708.04552: 16 pixels on CIFAR-10's 32.
    """
    hit = torch.ones(1, dtype=torch.bool, device=x_NCHW.device)
    for axis, draw_N in zip((2, 3), draws_N2.unbind(1), strict=True):
        side = x_NCHW.shape[axis]
        start_N = (draw_N * side).long() - side // 4
        offset_NS = torch.arange(side, device=x_NCHW.device) - start_N[:, None]
        shape = [len(x_NCHW), 1, 1, 1]
        shape[axis] = side
        hit = hit & ((offset_NS >= 0) & (offset_NS < side // 2)).reshape(shape)
    return x_NCHW.masked_fill(hit, 0)


AUGMENTATIONS: dict[str, Augmentation] = {"crop": random_crop, "flip": random_flip, "cutout": cutout}
"""What `[data] augment` and `BatchAugmentation` know by name."""


def augmented(inputs: Inputs, names: Sequence[str]) -> Inputs:
    """The inputs with the augmentations `names` applied, in that order, to those that are images, (N, C, H, W).

    Numbers are drawn from torch's generator of the images' device, for every sample by itself.

    Raises:
        DataError: there are no images.
    """
    if not names:
        return inputs
    images = {name: x for name, x in inputs.items() if x.dim() == 4}
    check_images({name: tuple(x.shape) for name, x in inputs.items()}, names, "the batch")
    result = dict(images)
    for name in names:
        first = next(iter(images.values()))
        draws_N2 = torch.rand(len(first), 2, device=first.device)
        result = {key: AUGMENTATIONS[name](x, draws_N2) for key, x in result.items()}
    return {**inputs, **{key: _laid_out_as(images[key], x) for key, x in result.items()}}


def check_images(shapes: Mapping[str | None, Sequence[int]], names: Sequence[str], what: str) -> None:
    """Raises `DataError` if augmentations are asked for and no input of `what` is images (N, C, H, W)."""
    if names and not any(len(shape) == 4 for shape in shapes.values()):
        found = ", ".join(f"{name or 'one array'} of shape {tuple(shape)}" for name, shape in shapes.items())
        raise DataError(
            f"augment is {', '.join(names)}, for images (N, C, H, W), but {what} holds {found}; leave it empty"
        )


class BatchAugmentation:
    """Makes batches of M augmented copies; for loops of your own. `[data] copies` and `augment` do it in the trainer.

    >>> four = BatchAugmentation(4, ["crop", "flip"])
    >>> images, labels = four(torch.randn(8, 3, 32, 32), torch.arange(8))
    >>> images.shape, labels[:9].tolist()
    (torch.Size([32, 3, 32, 32]), [0, 1, 2, 3, 4, 5, 6, 7, 0])

    Steps per epoch and learning rate stay as they are. Of several processes each has copies of its own samples.

    Args:
        copies: M; 1 augments alone.
        augment: names in `AUGMENTATIONS`, or a function from inputs to inputs. The function is called once for each
            copy, so that one that draws a single number for a whole batch still makes copies that differ.

    Raises:
        ConfigError: fewer copies than one, or an augmentation that there is not.
    """

    def __init__(self, copies: int, augment: Sequence[str] | Callable[[Any], Any]) -> None:
        if isinstance(copies, bool) or not isinstance(copies, int) or copies < 1:
            raise ConfigError(f"copies is {copies!r}; give a whole number of at least 1")
        if isinstance(augment, str):
            raise ConfigError(f"augment is a list of names; write augment=[{augment!r}]")
        for name in () if callable(augment) else augment:
            if name not in AUGMENTATIONS:
                known = ", ".join(AUGMENTATIONS)
                raise ConfigError(
                    f"no augmentation is called {name!r}; choose from {known}{nearest_hint(name, AUGMENTATIONS)}"
                )
        self.copies = copies
        self.augment: Sequence[str] | Callable[[Any], Any] = augment

    def __call__(self, inputs: Any, labels: Tensor) -> tuple[Any, Tensor]:
        """M copies of a batch, all samples of the first copy first.

        Args:
            inputs: a tensor, or tensors by name, of which the images are augmented.
            labels: (N,), or probabilities (N, classes).

        Raises:
            DataError: there are no images, or not as many labels as samples.
        """
        named: Inputs = dict(inputs) if isinstance(inputs, Mapping) else {None: inputs}
        lengths = {len(x) for x in [*named.values(), labels]}
        if len(lengths) != 1:
            raise DataError(f"inputs and labels of a batch have different lengths: {sorted(lengths)}")
        made = [self._copy(inputs, named) for _ in range(self.copies)]
        joined = {name: torch.cat([copy[name] for copy in made]) for name in named}
        return joined if isinstance(inputs, Mapping) else joined[None], torch.cat([labels] * self.copies)

    def over(self, batches: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
        """The batches of a DataLoader, or of any iterable of (inputs, labels), each with its copies.

        Raises:
            DataError: a batch is something else; or see `__call__`.
        """
        for batch in batches:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise DataError(f"a batch is (inputs, labels), but the iterable gave a {type(batch).__name__}")
            yield self(*batch)

    def _copy(self, inputs: Any, named: Inputs) -> Inputs:
        if not callable(self.augment):
            return augmented(named, self.augment)
        made = self.augment(inputs)
        return made if isinstance(made, dict) else {None: made}


def _laid_out_as(like: Tensor, x: Tensor) -> Tensor:
    channels_last = like.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
