"""What a model costs: its parameters, and the multiply-adds of one image, counted from the shapes in its graph."""

import collections
import dataclasses
import math

import keras

from keras_vit import zoo
from keras_vit.errors import ArgumentError

OPERATORS = ("conv", "linear", "matmul")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one forward pass of one image. A multiply-add counts once, as in fvcore; twice that are its FLOPs.

    Norms, activations, softmax, sums and the resizing of weights, which is done once for a batch, are not counted.

    Attributes:
        parameters: numbers in the model's weights.
        conv, linear, matmul: multiply-adds of convolutions (patches among them), of products with weights, and of products of
            activations (attention).
    """

    parameters: int
    conv: int = 0
    linear: int = 0
    matmul: int = 0

    @property
    def macs(self):
        """All multiply-adds."""
        return self.conv + self.linear + self.matmul


def cost(model):
    """Counts a functional model of fixed size; a model without values (under `keras.StatelessScope`) will do.

        cost(keras_vit.ViT_B16(weights=None, input_shape=(384, 384, 3))).macs

    Args:
        model: of Keras's `Dense` and `Conv2D`, and of layers that have `multiply_adds`, as those of this package.

    Returns:
        A `Cost`.

    Raises:
        ArgumentError: a layer has a kernel and no `multiply_adds`, or a size is open.
    """
    total = collections.Counter()
    for layer, input_shape, options in zoo.calls(model):
        if isinstance(layer, keras.Model):
            inner = cost(layer)
            total += collections.Counter({name: getattr(inner, name) for name in OPERATORS})
        elif isinstance(layer, (keras.layers.Dense, keras.layers.Conv2D)) or hasattr(layer, "multiply_adds"):
            if None in input_shape[1:]:
                raise ArgumentError(
                    f"cost of {model.name!r}: layer {layer.name!r} takes {input_shape}, of no fixed size; build the model with "
                    "input_shape=(H, W, 3)."
                )
            own = getattr(layer, "multiply_adds", None)
            total += own(input_shape, **options) if own else _of_keras(layer, input_shape)
        elif any(weight.name.endswith("kernel") for weight in layer.weights):
            raise ArgumentError(
                f"cost of {model.name!r}: layer {layer.name!r} of {type(layer).__name__} has a kernel, and nothing says how "
                "often it is applied; give its class a method multiply_adds(input_shape) that returns a collections.Counter."
            )
    return Cost(model.count_params(), **total)


def _of_keras(layer, input_shape):
    positions = math.prod(layer.compute_output_shape(input_shape)[1:-1])
    kind = "linear" if isinstance(layer, keras.layers.Dense) else "conv"
    return collections.Counter({kind: positions * math.prod(layer.kernel.shape)})
