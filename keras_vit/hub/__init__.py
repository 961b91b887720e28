"""TF-Hub modules: written from a Keras model, checked, and used and fine-tuned inside Keras 3."""

from keras_vit.hub.layer import HubLayer as HubLayer
from keras_vit.hub.manifest import digest as digest
from keras_vit.hub.manifest import verify as verify
from keras_vit.hub.module import check as check
from keras_vit.hub.module import export as export
