"""How one array of a file relates to one weight of ours. Each transform knows both directions and the shape it expects."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Whole:
    """The file's array is the weight."""

    index, of = 0, 1

    def file_shape(self, shape):
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

    def place(self, array, weight):
        weight[self._slot()] = array

    def take(self, weight):
        return weight[self._slot()]
