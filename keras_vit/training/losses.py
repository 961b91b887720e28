"""Losses that Keras does not have."""

import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_vit")
class SigmoidCrossEntropy(keras.losses.Loss):
    """(b, c) labels, (b, c) logits -> (): binary cross-entropy summed over the classes, its mean over the batch.

    big_vision's `sigmoid_xent`, by which AugReg's models are pre-trained. (`keras.losses.BinaryCrossentropy` takes the mean over
    the classes, c times less.)

    Args:
        label_smoothing: share of a label that is spread evenly over all classes.
        **kwargs: of `keras.losses.Loss`.
    """

    def __init__(self, label_smoothing=0.0, name="sigmoid_cross_entropy", **kwargs):
        super().__init__(name=name, **kwargs)
        self.label_smoothing = label_smoothing

    def call(self, y_true, y_pred):
        labels = ops.cast(y_true, y_pred.dtype)
        labels = labels * (1.0 - self.label_smoothing) + self.label_smoothing / labels.shape[-1]
        return ops.sum(ops.binary_crossentropy(labels, y_pred, from_logits=True), axis=-1)

    def get_config(self):
        return {**super().get_config(), "label_smoothing": self.label_smoothing}
