"""Accuracy on the training images themselves, without augmentation: a part of them, drawn once."""

import dataclasses

import numpy as np

from keras_vit import errors
from keras_vit.data.pipeline import Source

_STREAM = 100  # of random numbers under one seed, apart from those of `data.pipeline`


@dataclasses.dataclass(frozen=True, eq=False)
class _Sample(Source):
    whole: Source = dataclasses.field(default=None, repr=False)
    count: int = 0
    seed: int = 0

    def ordered(self):
        buffer = 2 * self.count  # of encoded images; digits and files are shuffled as a whole, without one
        return self.whole.shuffled(np.array([self.seed, _STREAM], np.int64), buffer).take(self.count)


def training_sample(source, count, seed=0):
    """A fixed pseudo-random choice of `count` examples, as a source for `pipeline.eval_batches`: every pass has the same ones.

        batches = pipeline.eval_batches(training_sample(train, 2048), size=224, batch=64)

    Digits and folders are drawn from as a whole. TFDS is read from its start, in the order in which it was shuffled when it was
    written: the examples are among its first 3 x `count`.

    Args:
        source: of `pipeline.open_source`, such as the training split. Where it has fewer examples, all of them are taken.
        count: above 0.
        seed: whole number.
    """
    if count < 1:
        raise errors.ArgumentError(f"training_sample: expected a count above 0, got {count}.")
    same = {field.name: getattr(source, field.name) for field in dataclasses.fields(Source)}
    there = None if source.num_examples is None else min(count, source.num_examples)
    return _Sample(**same | dict(num_examples=there, paths=()), whole=source, count=count, seed=seed)
