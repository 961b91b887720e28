"""Object detection: keras_hub's detectors on a keras_vit model. Importing this file imports keras_hub, an optional package."""

import math

import keras

from keras_vit.dense.pyramid import levels_of, pyramid
from keras_vit.errors import ArgumentError

try:
    import keras_hub
except ImportError as error:
    raise ImportError(
        f"keras_vit.dense.detection needs the package keras-hub, which cannot be imported ({error}); pip install "
        "'keras_vit[detect]'."
    ) from error


PRIOR = 0.01  # the probability of an object that RetinaNet begins with at every anchor


@keras.saving.register_keras_serializable("keras_vit")
class PyramidBackbone(keras_hub.models.FeaturePyramidBackbone):
    """A keras_vit model as keras_hub's `FeaturePyramidBackbone`: its `pyramid_outputs` are {"P2": (b, h, w, c), "P3": ...}.

    Args:
        features: what `keras_vit.dense.pyramid` made of a model; it keeps its weights.
    """

    def __init__(self, features, dtype=None, **kwargs):
        super().__init__(features.inputs[0], features.output, dtype=dtype, **kwargs)
        self.features, self.pyramid_outputs = features, features.output

    def get_config(self):
        return {**super().get_config(), "features": keras.saving.serialize_keras_object(self.features)}

    @classmethod
    def from_config(cls, config):
        config = {**config, "features": keras.saving.deserialize_keras_object(config["features"])}
        return super().from_config(config)


def retinanet(model, classes, levels=(3, 7), norms=True, bounding_box_format="xyxy", **options):
    """keras_hub's RetinaNet (arXiv 1708.02002) on a keras_vit model, as PoolFormer's authors train it (2111.11418, section 4.2).

        detector = retinanet(keras_vit.PoolFormer_S12(input_shape=(512, 512, 3)), classes=80)
        detector.compile("adamw")
        detector.fit(images, {"boxes": ..., "labels": ...})

    Images are in the range of the model's weights: `keras_vit.preprocess_input(x, model)`.

    Args:
        model: a classifier with a pyramid; the detector shares its weights.
        classes: number of classes of boxes.
        levels: first and last level of the detector's own pyramid; those above the model's are made by convolutions.
        norms: see `keras_vit.dense.pyramid`.
        bounding_box_format: of the boxes, such as "xyxy".
        options: for `keras_hub.models.RetinaNetObjectDetector`, such as anchor_generator or prediction_decoder.

    Returns:
        A `keras_hub.models.RetinaNetObjectDetector`.

    Raises:
        ArgumentError: the model has no such levels.
    """
    (first, last), having = levels, levels_of(model)
    if first not in having or first > last or max(having) < min(last, 5):
        raise ArgumentError(
            f"retinanet: {model.name!r} has features of the levels {list(having)}; expected levels=(first, last) that begin with "
            f"one of them, and end above them only if they reach 5, got {levels!r}."
        )
    features = pyramid(model, norms, [n for n in having if first <= n <= last])
    backbone = PyramidBackbone(features, name=f"{model.name}_backbone")
    shape, given = tuple(model.input_shape[1:]), dict(bounding_box_format=bounding_box_format, **options)
    encoder = keras_hub.models.RetinaNetBackbone(
        backbone, first, last, use_p5=False, image_shape=shape, data_format="channels_last"
    )
    detector = keras_hub.models.RetinaNetObjectDetector(encoder, classes, **given)
    prior = given.get("classification_head_prior_probability", PRIOR)
    # keras-hub 0.32 begins with the classes' prior in the boxes: too small by a factor of 99, and the first losses explode
    for head, start in ((detector.classification_head, math.log(prior / (1 - prior))), (detector.box_head, 0.0)):
        bias = head.prediction_layer.bias
        bias.assign(keras.ops.full(bias.shape, start))
    return detector
