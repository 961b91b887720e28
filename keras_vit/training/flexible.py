"""Training at many patch sizes at once: each step draws one of them (FlexiViT, arXiv 2212.08013, section 3)."""

import functools

import keras
import numpy as np
from keras import ops

from keras_vit.errors import ArgumentError
from keras_vit.training.step import Learner


class Flexible(Learner):
    """A `Learner` whose `fit` trains through one of several models of the same layers, drawn anew for each step.

    Evaluation and prediction do not draw. A step computes the gradient inside the one that is drawn, so that it takes the memory
    of one, the largest, and all shapes are known beforehand. The draws are a function of the seed and of how many there were.

    Args:
        inputs, outputs: of a functional model.
        others: functional models of its layers, at other patch sizes for example.
        probabilities: of each of the others; their sum is 1.
        seed: whole number.
        **kwargs: of `Learner`.
    """

    def __init__(self, inputs, outputs, others, probabilities, seed, **kwargs):
        super().__init__(inputs, outputs, **kwargs)
        self.others = [other.__call__ for other in others]  # as functions, since their weights are this model's
        self.upper = np.cumsum(probabilities)[:-1].astype("float32")
        self.random = keras.random.SeedGenerator(seed)
        self.drawn = None

    def draw(self):
        """() int32: the number of one of the others."""
        value = keras.random.uniform((), seed=self.random)
        return ops.sum(ops.cast(ops.greater_equal(value, self.upper), "int32"))

    def through(self, drawn, function, *args):
        """`function(*args)`, in which a call of this model is one of the other of that number."""
        self.drawn = drawn
        try:
            return function(*args)
        finally:
            self.drawn = None

    def call(self, inputs, training=None, mask=None):
        if self.drawn is None:
            return super().call(inputs, training=training, mask=mask)
        return self.others[self.drawn](inputs, training=training)

    def gradient(self, weights, others, data, *args, **kwargs):
        with keras.StatelessScope(state_mapping=zip(self.non_trainable_variables, others)) as scope:
            drawn = self.draw()
            others = [scope.get_current_value(variable) for variable in self.non_trainable_variables]
        gradient = functools.partial(super().gradient, weights, others, data, *args, **kwargs)
        return ops.switch(drawn, [functools.partial(self.through, i, gradient) for i in range(len(self.others))])


def learner(model, patch_sizes, probabilities=None, seed=0, **kwargs):
    """What is compiled and fitted to train a FlexiViT's own weights at many patch sizes, of which each step draws one.

    Evaluation and prediction are at the model's own patch size, and what is trained is `model`, which is to be saved. The first
    step compiles all patch sizes.

        trained = flexible.learner(model, flexivit.PATCH_SIZES)
        trained.compile(...)
        trained.fit(...)

    Args:
        model: built by `FlexiViT` or one of its variants.
        patch_sizes: sides of patches in pixels, or (height, width).
        probabilities: a weight for each patch size, relative to the others; None for all alike.
        seed: whole number; the same seed draws the same patch sizes, on the same backend and with the same `jit_compile`.
        **kwargs: of `step.Learner`: parts, clip_norm, ...

    Raises:
        ArgumentError: the model is no FlexiViT, its images have no such patch, or the probabilities are none.
    """
    sizes = list(patch_sizes)
    weights = np.ones(len(sizes)) if probabilities is None else np.asarray(probabilities, float)
    if not sizes or weights.shape != (len(sizes),) or not np.isfinite(weights).all() or weights.min() < 0 or not weights.any():
        raise ArgumentError(
            "flexible.learner: expected patch sizes and as many probabilities, none below 0 and not all 0, got "
            f"patch_sizes={patch_sizes!r} and probabilities={probabilities!r}."
        )
    patches = [layer for layer in getattr(model, "layers", ()) if layer.name == "patches" and hasattr(layer, "at")]
    if not patches:
        raise ArgumentError(f"flexible.learner: expected a model built by FlexiViT, got {model!r}; pass the model itself.")
    others = [patches[0].at(model, size) for size in sizes]
    return Flexible(model.input, model.output, others, weights / weights.sum(), seed, name=model.name, **kwargs)
