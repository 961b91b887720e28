"""How one array of a file relates to one weight of ours. Each transform knows both directions and the shape it expects."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Whole:
    """The file's array is the weight."""

    index, of = 0, 1

    def file_shape(self, shape):
        return tuple(shape)

    def weight_shape(self, shape):
        """The weight's shape as far as the array's tells it: axes that the array merges stay one."""
        return tuple(shape)

    def place(self, array, weight):
        weight[...] = array

    def take(self, weight):
        return weight


@dataclasses.dataclass(frozen=True)
class Wrapped(Whole):
    """The file's array is the weight behind `axes` axes of length 1, as old files keep group-norm arrays."""

    axes: int = 3

    def file_shape(self, shape):
        return (*(1,) * self.axes, *shape)

    def place(self, array, weight):
        weight[...] = array.reshape(weight.shape)

    def take(self, weight):
        return np.reshape(weight, self.file_shape(weight.shape))


@dataclasses.dataclass(frozen=True)
class Part:
    """The file's array is slice `index` of `of` along `axis` of the weight, an axis that the file does not have."""

    index: int
    of: int
    axis: int

    def _slot(self):
        return (*(slice(None),) * self.axis, self.index)

    def file_shape(self, shape):
        return (*shape[: self.axis], *shape[self.axis + 1 :])

    def weight_shape(self, shape):
        return tuple(shape)  # without the axis that the array lacks

    def place(self, array, weight):
        weight[self._slot()] = array

    def take(self, weight):
        return weight[self._slot()]


@dataclasses.dataclass(frozen=True)
class Turned(Whole):
    """The file's array is the weight with its axes in another order, neighbours of them merged into one.

    Args:
        axes: the weight's axes in the file's order.
        merged: how many of them each axis of the file holds, 0 for an axis of length 1; () for one each.
        part: what of the weight the file's array holds, `Whole` or a `Part`.
    """

    axes: tuple
    merged: tuple = ()
    part: Whole = Whole()

    @property
    def index(self):
        return self.part.index

    @property
    def of(self):
        return self.part.of

    def _turned(self, shape):
        """The shape of the weight's part, in the file's order but not merged."""
        shape = self.part.file_shape(shape)
        return tuple(shape[axis] for axis in self.axes)

    def file_shape(self, shape):
        sides, at = [], 0
        for count in self.merged or (1,) * len(self.axes):
            sides.append(math.prod(self._turned(shape)[at : at + count]))
            at += count
        return tuple(sides)

    def weight_shape(self, shape):
        groups, at = [], 0
        for count in self.merged or (1,) * len(self.axes):
            groups.append(min(self.axes[at : at + count], default=None))
            at += count
        return tuple(side for group, side in sorted((g, side) for g, side in zip(groups, shape) if g is not None))

    def place(self, array, weight):
        back = tuple(sorted(range(len(self.axes)), key=self.axes.__getitem__))
        self.part.place(np.transpose(array.reshape(self._turned(weight.shape)), back), weight)

    def take(self, weight):
        return np.transpose(self.part.take(weight), self.axes).reshape(self.file_shape(weight.shape))
