import collections
import math

import keras
from keras import ops


def standardised(kernel, epsilon=1e-5):
    """(h, w, c, d) -> (h, w, c, d): for each output zero mean, and divided by the deviation plus `epsilon` (arXiv 1903.10520)."""
    flat = ops.reshape(kernel, (-1, kernel.shape[-1]))
    flat = flat - ops.mean(flat, axis=0)
    deviation = ops.sqrt(ops.mean(ops.square(flat), axis=0))
    return ops.reshape(flat * (1 / (deviation + epsilon)), kernel.shape)


@keras.saving.register_keras_serializable("keras_vit")
class StdConv(keras.layers.Layer):
    """(b, h, w, c) -> (b, h / stride, w / stride, d): convolution without bias whose kernel is standardised in every call.

    Sides are rounded up. The zeros around the image are TensorFlow's and XLA's "SAME": where their number is odd, one more at the
    end. The kernel is standardised in float32 whatever the compute type. Weights: `kernel` (kernel_size, kernel_size, c, d).

    Args:
        width: d, the number of output channels.
        kernel_size, stride: of the window, in pixels of the input.
    """

    def __init__(self, width, kernel_size, stride=1, **kwargs):
        super().__init__(**kwargs)
        self.width, self.kernel_size, self.stride = width, kernel_size, stride

    def build(self, input_shape):
        shape = (self.kernel_size, self.kernel_size, input_shape[-1], self.width)
        self.kernel = self.add_weight(shape=shape, initializer="lecun_normal", autocast=False, name="kernel")

    def call(self, x):
        kernel = ops.cast(standardised(self.kernel), self.compute_dtype)
        return ops.conv(x, kernel, self.stride, "same", "channels_last")

    def multiply_adds(self, input_shape):
        """ "conv" of one example (b, h, w, c)."""
        return collections.Counter(conv=math.prod(self.compute_output_shape(input_shape)[1:3]) * math.prod(self.kernel.shape))

    def compute_output_shape(self, input_shape):
        b, *sides, _ = input_shape
        return (b, *(side and -(-side // self.stride) for side in sides), self.width)


def batch_norm(**kwargs):
    """Keras's batch norm with PyTorch's defaults."""
    return keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5, **kwargs)


@keras.saving.register_keras_serializable("keras_vit")
class GroupNorm(keras.layers.Layer):
    """(b, h, w, c) -> (b, h, w, c): channels in groups, each group with zero mean and unit variance over an image.

    The numbers of `keras.layers.GroupNormalization` (arXiv 1803.08494) in half its time or less on a CPU: channels are averaged
    over the image before they are grouped. Computed in float32. Weights: `gamma` and `beta` (c,).

    Args:
        groups: number of groups; must divide c.
        epsilon: added to the variance.
        gamma_initializer: of the scale.
    """

    def __init__(self, groups=32, epsilon=1e-6, gamma_initializer="ones", **kwargs):
        super().__init__(**kwargs)
        self.groups, self.epsilon, self.gamma_initializer = groups, epsilon, gamma_initializer

    def build(self, input_shape):
        width = input_shape[-1]
        if width % self.groups:
            raise ValueError(
                f"GroupNorm {self.name!r}: {width} channels are not divisible by groups={self.groups}; choose a divisor."
            )
        self.gamma = self.add_weight(shape=(width,), initializer=self.gamma_initializer, autocast=False, name="gamma")
        self.beta = self.add_weight(shape=(width,), initializer="zeros", autocast=False, name="beta")

    def call(self, x):
        x = ops.cast(x, "float32")
        x = x - self._mean(x)
        scale = self.gamma * ops.rsqrt(self._mean(ops.square(x)) + self.epsilon)
        return ops.cast(x * scale + self.beta, self.compute_dtype)

    def _mean(self, x):
        """(b, h, w, c) -> (b, 1, 1, c), or (b, 1, 1, 1) of one group: the mean over the image and over each channel's group."""
        if self.groups == 1:
            return ops.mean(ops.mean(x, axis=(1, 2), keepdims=True), axis=-1, keepdims=True)
        width = x.shape[-1]
        size = width // self.groups
        means = ops.mean(ops.reshape(ops.mean(x, axis=(1, 2)), (-1, self.groups, size)), axis=-1)
        return ops.reshape(ops.repeat(means, size, axis=-1), (-1, 1, 1, width))

    def compute_output_shape(self, input_shape):
        return input_shape
