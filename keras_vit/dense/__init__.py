"""Dense prediction on any model that has a pyramid of features: `pyramid`, `segmentation` and, on keras_hub, `detection`."""

from keras_vit.dense.pyramid import pyramid
from keras_vit.dense.segmentation import semantic_fpn

__all__ = ["pyramid", "semantic_fpn"]
