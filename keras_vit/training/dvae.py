"""A small discrete variational autoencoder (arXiv 2102.12092), whose codes masked pre-training guesses (BEiT, 2106.08254).

    tokenizer = encoder((32, 32, 3), patch_size=8, vocabulary=64)
    graph = autoencoder(tokenizer, steps=1000)
    learner = Learner(graph.inputs, graph.outputs, objective=Outputs(graph))
    learner.compile(optimizer)
    learner.fit(...)
    targets = CodeTargets(tokenizer)

BEiT takes DALL-E's, of 8,192 codes and 250 million images. This one learns from the images at hand.
"""

import keras
import numpy as np
from keras import ops

from keras_vit import zoo
from keras_vit.data.pixels import Pixels
from keras_vit.errors import ArgumentError
from keras_vit.layers import Patches


def encoder(input_shape, patch_size, vocabulary=64, width=64, depth=2, name="dVAE"):
    """A model (b, H, W, 3) -> (b, h, w, vocabulary): the logits of each patch's code, of images in [-1, 1].

    Args:
        input_shape: (H, W, 3), multiples of the patch.
        patch_size: side of a patch in pixels.
        vocabulary: how many codes there are, at least 2.
        width, depth: channels; convolutions of 3 x 3 patches with a residual connection around each.

    Raises:
        ArgumentError: a value out of range.
    """
    if vocabulary < 2 or min(width, depth, patch_size) < 1 or input_shape[0] % patch_size or input_shape[1] % patch_size:
        raise ArgumentError(
            f"{name}: expected at least 2 codes, width, depth and patch_size above 0 and images in whole patches, got "
            f"vocabulary={vocabulary}, width={width}, depth={depth}, patch_size={patch_size} and {tuple(input_shape)}."
        )
    images = keras.Input(input_shape, name="images")
    x = _convolved(Patches(width, patch_size, name="patches")(images), width, depth, "encoder")
    x = keras.layers.Dense(vocabulary, dtype="float32", name="codes")(x)
    model = zoo.Model(images, x, name=name)
    model.remember(variant=name, weights_info=dict(preprocessing=Pixels().asdict(), include_preprocessing=False))
    return model


def _convolved(x, width, depth, name):
    for i in range(depth):
        y = keras.layers.Activation("relu", name=f"{name}_relu_{i}")(x)
        y = keras.layers.Conv2D(width, 3, padding="same", data_format="channels_last", name=f"{name}_conv_{i}")(y)
        x = keras.layers.Add(name=f"{name}_add_{i}")([x, y])
    return keras.layers.Activation("relu", name=f"{name}_relu")(x)


def autoencoder(tokenizer, steps, *, temperatures=(1.0, 1 / 16), divergence=0.01, seed=0):
    """A graph (b, H, W, 3) -> (b, 1): what is lost of each image that goes through its codes.

    In training a code is drawn by Gumbel-softmax, at a temperature that falls from the first to the second of `temperatures`
    along a cosine over `steps` steps, as in DALL-E; otherwise it is the best one. The loss is the mean squared error of the
    pixels plus `divergence` times KL(codes || uniform), the mean over the patches.

    Args:
        tokenizer: of `encoder`.
        steps: after which the temperature stays.
        seed: of the draws.
    """
    _, height, width, _ = tokenizer.input_shape
    _, h, w, vocabulary = tokenizer.output_shape
    channels, depth = tokenizer.get_layer("patches").width, sum("_conv_" in layer.name for layer in tokenizer.layers)
    images = keras.Input(tokenizer.input_shape[1:], name="images")
    logits = tokenizer(images)
    x = Gumbel(steps, temperatures, seed, dtype="float32", name="gumbel")(logits)
    x = keras.layers.Dense(channels, use_bias=False, name="code_vectors")(x)
    x = _convolved(x, channels, depth, "decoder")
    x = keras.layers.Dense((height // h) * (width // w) * 3, dtype="float32", name="pixels")(x)
    losses = ReconstructionLoss(divergence, dtype="float32", name="reconstruction_loss")([images, x, logits])
    return keras.Model(images, losses, name=f"{tokenizer.name}_autoencoder")


@keras.saving.register_keras_serializable("keras_vit")
class Gumbel(keras.layers.Layer):
    """(..., n) logits -> (..., n): a relaxed draw of one of n in training (arXiv 1611.01144), else the best one.

    Args:
        steps: calls in training over which the temperature falls. temperatures: from, to. seed: of the draws.
    """

    def __init__(self, steps, temperatures=(1.0, 1 / 16), seed=0, **kwargs):
        super().__init__(**kwargs)
        self.steps, self.temperatures, self.seed = steps, tuple(temperatures), seed
        self.random = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        self.made = self.add_weight(shape=(), initializer="zeros", trainable=False, name="made")

    def call(self, x, training=False):
        if not training:
            return ops.one_hot(ops.argmax(x, axis=-1), x.shape[-1], dtype=x.dtype)
        first, last = self.temperatures
        share = ops.minimum(self.made.value / self.steps, 1.0)
        temperature = last + (first - last) * (1 + ops.cos(np.pi * share)) / 2
        self.made.assign(self.made + 1)
        uniform = keras.random.uniform(ops.shape(x), 1e-6, 1 - 1e-6, dtype=x.dtype, seed=self.random)
        return ops.softmax((x - ops.log(-ops.log(uniform))) / temperature)

    def get_config(self):
        return {**super().get_config(), "steps": self.steps, "temperatures": self.temperatures, "seed": self.seed}


@keras.saving.register_keras_serializable("keras_vit")
class ReconstructionLoss(keras.layers.Layer):
    """[(b, H, W, 3), (b, h, w, p * p * 3), (b, h, w, n) logits] -> (b, 1): squared error of pixels, and divergence of codes.

    Args:
        divergence: weight of KL(codes || uniform).
    """

    def __init__(self, divergence, **kwargs):
        super().__init__(**kwargs)
        self.divergence = divergence

    def call(self, inputs):
        images, x, logits = inputs
        (height, width), (h, w) = images.shape[1:3], x.shape[1:3]
        x = ops.reshape(x, (-1, h, w, height // h, width // w, 3))
        x = ops.reshape(ops.transpose(x, (0, 1, 3, 2, 4, 5)), (-1, height, width, 3))
        error = ops.mean(ops.square(x - ops.cast(images, x.dtype)), axis=(1, 2, 3))
        logs = ops.log_softmax(logits)
        divergence = ops.sum(ops.exp(logs) * (logs + float(np.log(logits.shape[-1]))), axis=-1)
        return (error + self.divergence * ops.mean(divergence, axis=(1, 2)))[:, None]

    def compute_output_shape(self, input_shape):
        return (input_shape[0][0], 1)

    def get_config(self):
        return {**super().get_config(), "divergence": self.divergence}
