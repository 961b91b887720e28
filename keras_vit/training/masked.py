"""Masked-image pre-training (BEiT, arXiv 2106.08254; SimMIM, arXiv 2111.09886): a model guesses the patches that it does not see.

    graph = rewired(model, PixelTargets())
    learner = Learner(graph.inputs, graph.outputs, objective=Outputs(graph))
    learner.compile(optimizer)
    learner.fit(masked(pipeline.train_batches(...), 512, grid_of(model), Mask(0.4), seed=0), steps_per_epoch=1000)

It trains the layers of `model` itself, which is then fine-tuned. An image's fourth channel says where it is hidden: 1 in pixels
of masked patches, else 0. So batches, losses and predictions are those of any model with one input and one output.
"""

import dataclasses
import re

import keras
import numpy as np
from keras import ops

from keras_vit import zoo
from keras_vit.errors import ArgumentError, DataError
from keras_vit.layers import MaskToken
from keras_vit.training.objectives import Seen

_STREAM = 200  # of random numbers under one seed, apart from those of `data.pipeline`
ATTEMPTS = 10  # boxes drawn for one block


# ---------------------------------------------------------------- which patches are hidden


@dataclasses.dataclass(frozen=True)
class Mask:
    """How patches are chosen to be hidden: in blocks, as BEiT draws them (section 2.3 and Algorithm 1).

    Args:
        ratio: of all patches, between 0 and 1, both excluded; the count is rounded down and at least 1. BEiT hides 75 of 196.
        least: patches of the smallest block; BEiT's 16. It cannot be more than are to be hidden.
        aspect: the least height / width of a block; the greatest is its inverse.

    Raises:
        ArgumentError: a value out of range.
    """

    ratio: float = 0.4
    least: int = 16
    aspect: float = 0.3

    def __post_init__(self):
        if not 0 < self.ratio < 1:
            raise ArgumentError(f"Mask: ratio, the share of patches that are hidden, must lie in (0, 1), got {self.ratio!r}.")
        if not isinstance(self.least, int) or self.least < 1 or not 0 < self.aspect <= 1:
            raise ArgumentError(
                f"Mask: least must be a whole number above 0 and aspect lie in (0, 1], got {self.least!r} and {self.aspect!r}."
            )

    def count(self, grid):
        """How many patches of a grid are to be hidden; fewer are where no block fits any more.

        Raises:
            ArgumentError: the smallest block has more patches than that.
        """
        count = max(1, int(self.ratio * grid[0] * grid[1]))
        if self.least > count:
            raise ArgumentError(
                f"Mask: of the {grid[0]} x {grid[1]} patches, ratio={self.ratio} hides {count}, fewer than the {self.least} of "
                f"the smallest block; pass least={max(1, count // 4)} or a larger ratio."
            )
        return count

    def draw(self, grid, generator):
        """bool (h, w): the masking of one image; a function of the numbers that a `numpy.random.Generator` gives."""
        (height, width), count = grid, self.count(grid)
        mask, hidden = np.zeros(grid, bool), 0
        while hidden < count:
            most = count - hidden
            for _ in range(ATTEMPTS):
                # As in the original, from the other end where fewer patches are left than the smallest block has
                area = self.least + (most - self.least) * generator.random()
                ratio = np.exp(np.log(self.aspect) * (1 - 2 * generator.random()))
                h, w = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
                if h >= height or w >= width:
                    continue
                top, left = generator.integers(height - h + 1), generator.integers(width - w + 1)
                block = mask[top : top + h, left : left + w]
                new = h * w - int(block.sum())
                if 0 < new <= most:
                    block[...] = True
                    hidden += new
                    break
            else:
                break
        return mask


def masked(batches, batch, grid, mask, seed, start=0, shard=(0, 1)):
    """Batches of (images, labels) -> (images with the mask as fourth channel, zeros (n, 1)).

    The mask of an image is a function of `seed` and of its place in the stream, whoever reads it.

    Args:
        batches: `tf.data.Dataset` of (images (n, H, W, 3), labels).
        batch: examples in a batch, of all workers together; the last one may have fewer.
        grid: (h, w) of the patches.
        mask: a `Mask`.
        seed: whole number.
        start: how many examples were already consumed, as in `pipeline.train_batches`.
        shard: (worker, workers), as there: `batches` are that worker's slices.
    """
    import tensorflow as tf

    mask.count(grid)
    worker, workers = shard

    def drawn(first, count):
        places = first + np.arange(count)
        return np.stack([mask.draw(grid, np.random.default_rng([seed % 2**64, _STREAM, place])) for place in places])

    def hide(number, pair):
        images, count = pair[0], tf.shape(pair[0])[0]
        first = start + number * batch + worker * (batch // workers)
        hidden = tf.numpy_function(drawn, [first, count], tf.bool, stateful=False)
        hidden = tf.cast(tf.reshape(hidden, [-1, *grid, 1]), images.dtype)
        height, width = (side // patches for side, patches in zip(images.shape[1:3], grid))
        hidden = tf.repeat(tf.repeat(hidden, height, 1), width, 2)
        rest = [[0, side - hidden.shape[axis]] for axis, side in ((1, images.shape[1]), (2, images.shape[2]))]
        hidden = tf.pad(hidden, [[0, 0], *rest, [0, 0]])  # pixels that fill no patch
        whole = tf.concat([images, hidden], -1)
        return tf.ensure_shape(whole, [images.shape[0], *images.shape[1:3], 4]), tf.zeros([count, 1])

    return batches.enumerate().map(hide, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).prefetch(2)


# ---------------------------------------------------------------- layers


@keras.saving.register_keras_serializable("keras_vit")
class Images(keras.layers.Layer):
    """(b, H, W, 4) -> (b, H, W, 3): all channels but the mask."""

    def call(self, x):
        return x[..., :3]


@keras.saving.register_keras_serializable("keras_vit")
class Hidden(keras.layers.Layer):
    """(b, H, W, 4) -> (b, h, w): which patches of a grid are masked, 1 or 0.

    Args:
        grid: (h, w).
    """

    def __init__(self, grid, **kwargs):
        super().__init__(**kwargs)
        self.grid = tuple(grid)

    def call(self, x):
        (h, w), height, width = self.grid, x.shape[1] // self.grid[0], x.shape[2] // self.grid[1]
        return x[:, : h * height : height, : w * width : width, 3]

    def get_config(self):
        return {**super().get_config(), "grid": self.grid}


@keras.saving.register_keras_serializable("keras_vit")
class LastTokens(keras.layers.Layer):
    """(b, n + m, d) -> (b, n, d): the last n tokens, which are the patches' behind whatever tokens a family has before them.

    Args:
        count: n.
    """

    def __init__(self, count, **kwargs):
        super().__init__(**kwargs)
        self.count = count

    def call(self, x):
        return x[:, -self.count :]

    def get_config(self):
        return {**super().get_config(), "count": self.count}


def _of_hidden(losses, hidden):
    """(b, n) losses, (b, h, w) mask -> (b, 1): the mean over the masked patches of each image."""
    hidden = ops.cast(ops.reshape(hidden, (-1, losses.shape[-1])), losses.dtype)
    return (ops.sum(losses * hidden, axis=-1) / ops.maximum(ops.sum(hidden, axis=-1), 1.0))[:, None]


@keras.saving.register_keras_serializable("keras_vit")
class PixelLoss(keras.layers.Layer):
    """[(b, H, W, 3), (b, n, p * p * 3), (b, h, w)] -> (b, 1): mean absolute error of the pixels of masked patches."""

    def call(self, inputs):
        images, guesses, hidden = inputs
        (h, w), (height, width) = hidden.shape[1:], images.shape[1:3]
        p, q = height // h, width // w
        cut = ops.reshape(images[:, : h * p, : w * q], (-1, h, p, w, q, 3))
        wanted = ops.reshape(ops.transpose(cut, (0, 1, 3, 2, 4, 5)), (-1, h * w, p * q * 3))
        return _of_hidden(ops.mean(ops.abs(guesses - ops.cast(wanted, guesses.dtype)), axis=-1), hidden)

    def compute_output_shape(self, input_shape):
        return (input_shape[0][0], 1)


@keras.saving.register_keras_serializable("keras_vit")
class CodeLoss(keras.layers.Layer):
    """[(b, h, w, vocabulary) logits or (b, h, w) codes, (b, n, vocabulary), (b, h, w)] -> (b, 1): cross-entropy where masked."""

    def call(self, inputs):
        codes, guesses, hidden = inputs
        if len(codes.shape) == 4:
            codes = ops.argmax(codes, axis=-1)
        codes = ops.cast(ops.reshape(codes, (-1, guesses.shape[1])), "int32")
        return _of_hidden(ops.sparse_categorical_crossentropy(codes, guesses, from_logits=True), hidden)

    def compute_output_shape(self, input_shape):
        return (input_shape[1][0], 1)


# ---------------------------------------------------------------- what is to be guessed


class Targets:
    """What the hidden patches are to be guessed as; derive from it for another tokenizer.

    Attributes:
        frozen: models that it calls; see `objectives.Objective`.
    """

    frozen = ()

    def width(self, model, grid):
        """How many numbers the model guesses for each patch. Raises ArgumentError for a model that does not fit."""
        raise NotImplementedError

    def losses(self, images, guesses, hidden):
        """KerasTensors (b, H, W, 3), (b, n, width), (b, h, w) -> (b, 1): the loss of each image."""
        raise NotImplementedError


class PixelTargets(Targets):
    """The patches' own pixels, as the model is given them: L1, as in SimMIM."""

    def width(self, model, grid):
        _, height, width, _ = model.input_shape
        return (height // grid[0]) * (width // grid[1]) * 3

    def losses(self, images, guesses, hidden):
        return PixelLoss(dtype="float32", name="pixel_loss")([images, guesses, hidden])


class CodeTargets(Targets):
    """The codes that a frozen model gives the patches, as in BEiT; the model sees the whole image, prepared as it wants it.

    Args:
        tokenizer: images (b, H', W', 3) -> logits (b, h, w, vocabulary), or codes (b, h, w) of whole numbers below `vocabulary`.
        name: for errors.
        pixels: its preprocessing; None for that of its record, or without one the model's.
        vocabulary: how many codes there are, where the tokenizer does not say.
    """

    def __init__(self, tokenizer, name=None, pixels=None, vocabulary=None):
        self.tokenizer, self.name, self.pixels = tokenizer, name or tokenizer.name, pixels
        shape = tokenizer.output_shape
        self.vocabulary = shape[-1] if len(shape) == 4 else vocabulary
        if len(shape) not in (3, 4) or self.vocabulary is None:
            raise ArgumentError(
                f"tokenizer {self.name}: expected a model that gives logits (b, h, w, vocabulary), or codes (b, h, w) with "
                f"vocabulary=, got output {shape}."
            )
        tokenizer.trainable = False
        self.frozen = (tokenizer,)

    def width(self, model, grid):
        if tuple(self.tokenizer.output_shape[1:3]) != tuple(grid):
            raise ArgumentError(
                f"tokenizer {self.name}: gives a grid of {self.tokenizer.output_shape[1:3]} codes, {model.name} has "
                f"{tuple(grid)} patches; take images, patches or a tokenizer of another size."
            )
        own = zoo.pixels_of(model)
        self.seen = own, self.pixels or zoo.pixels_of(self.tokenizer, own)
        return self.vocabulary

    def losses(self, images, guesses, hidden):
        seen = Seen(*self.seen, self.tokenizer.input_shape[1:3], dtype="float32", name="seen")(images)
        return CodeLoss(dtype="float32", name="code_loss")([self.tokenizer(seen), guesses, hidden])


# ---------------------------------------------------------------- the model, rewired


def grid_of(model):
    """(h, w) of a model's patches.

    Raises:
        ArgumentError: it has none: no layer `patches` that gives a grid.
    """
    shape = zoo.tap(model, "patches").shape
    if len(shape) != 4 or None in shape[1:]:
        raise ArgumentError(f"{model.name}: expected a layer 'patches' that gives a grid (b, h, w, d), got {tuple(shape)}.")
    return tuple(shape[1:3])


def rewired(model, targets):
    """A new graph of a model's layers: images with a mask (b, H, W, 4) -> the loss of each image (b, 1).

    The output of layer `patches` gets a learned token in the place of masked patches and goes on through the model up to its last
    block; what that makes of the patches is normalised and mapped linearly to the guesses. The head and all that pools before it
    are left out and stay as they are.

    Args:
        model: with layers `patches` and `block_0`, `block_1`, ...
        targets: a `Targets`.

    Raises:
        ArgumentError: the model has no such layers, or the targets do not fit it.
    """
    grid = grid_of(model)
    blocks = [int(found[1]) for layer in model.layers if (found := re.fullmatch(r"block_(\d+)", layer.name))]
    if not blocks:
        raise ArgumentError(f"{model.name}: expected layers block_0, block_1, ..., got none; masked pre-training is for ViTs.")
    width = targets.width(model, grid)
    patches, last = zoo.tap(model, "patches"), zoo.tap(model, f"block_{max(blocks)}")
    x = keras.Input((*model.input_shape[1:3], 4), name="masked_images")
    images, hidden = Images(dtype="float32", name="images")(x), Hidden(grid, dtype="float32", name="hidden")(x)
    tokens = keras.Model(model.inputs, patches, name="stem")(images)
    tokens = MaskToken(name="mask_token", dtype=last.dtype)([tokens, hidden])
    tokens = keras.Model(patches, last, name="encoder")(tokens)
    tokens = LastTokens(grid[0] * grid[1], name="last_tokens", dtype=last.dtype)(tokens)
    tokens = keras.layers.LayerNormalization(epsilon=1e-6, dtype="float32", name="mask_norm")(tokens)
    guesses = keras.layers.Dense(width, dtype="float32", name="mask_head")(tokens)
    graph = keras.Model(x, targets.losses(images, guesses, hidden), name=f"{model.name}_masked")
    graph.frozen = list(targets.frozen)
    return graph


@dataclasses.dataclass(frozen=True)
class Judged:
    """The loss on all test images, whose masks are the same each time.

    Attributes:
        examples: how many. loss: the mean over them.
    """

    examples: int
    loss: float

    @property
    def figures(self):
        return {"loss": self.loss}


def judge(learner, tests):
    """A `Judged` of a learner that ends in losses.

    Raises:
        DataError: there are no examples.
    """
    losses = [learner.predict_on_batch(np.asarray(images)) for images, _ in tests]
    if not sum(map(len, losses)):
        raise DataError("judge: the data set has no examples; check its split.")
    losses = np.concatenate(losses)
    return Judged(len(losses), float(losses.mean(dtype=np.float64)))
