"""What is known of a published checkpoint before it is read: one record for each file."""

import dataclasses

from keras_vit.data.pixels import Pixels

GOOGLE_LICENCE = "Apache-2.0, as its repository google-research/vision_transformer states"
DEIT_LICENCE = "Apache-2.0, as its repository facebookresearch/deit states"
BIG_VISION_LICENCE = "Apache-2.0, as its repository google-research/big_vision states"


@dataclasses.dataclass(frozen=True)
class Weights:
    """One checkpoint file.

    Args:
        source: `gs://`, `https://` or local path.
        classes: outputs of its classifier.
        activation: what turns its logits into scores: "softmax" or "sigmoid".
        resolution: side of the square images it was last trained on, in pixels.
        tuned: whether that was fine-tuning, after which another resolution costs accuracy.
        size: published size in bytes, accurate to 1%, or None.
        pixels: the preprocessing it was trained with.
        licence: as its publisher states it.
        published: False for a file of a user, of which only the source is known.
        vocabulary: source of the file of the texts' vocabulary, where the model reads some.
        card: what its publisher's model card says of figures, uses and limits, in words of this package; Markdown.
    """

    source: str
    classes: int | None = 1000
    activation: str | None = "softmax"
    resolution: int | None = 224
    tuned: bool = False
    size: int | None = None
    pixels: Pixels = Pixels()
    licence: str | None = GOOGLE_LICENCE
    published: bool = True
    vocabulary: str | None = None
    card: str | None = None


IMAGENET21K = 21_843  # classes of the original's ImageNet-21k heads


def head_activation(classes):
    """How the original turns logits into scores: ImageNet-21k heads were trained with a sigmoid, all others with a softmax."""
    return "sigmoid" if classes == IMAGENET21K else "softmax"


def google(path, mib=None, *, bucket="vit_models", resolution=224, classes=1000, activation="auto", **facts):
    """A file of `gs://vit_models/` or another bucket; sizes in MiB are those the repository's notebook lists."""
    size = mib and round(mib * 2**20)
    activation = head_activation(classes) if activation == "auto" else activation
    return Weights(f"gs://{bucket}/{path}.npz", classes, activation, resolution, size=size, **facts)


def deit(file, resolution=224, tuned=False, **facts):
    """A file of facebookresearch/deit, which has DeiT, CaiT and ResMLP."""
    source = f"https://dl.fbaipublicfiles.com/deit/{file}.pth"
    return Weights(source, resolution=resolution, tuned=tuned, licence=DEIT_LICENCE, **facts)
