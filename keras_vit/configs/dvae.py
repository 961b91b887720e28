r"""Trains a small discrete autoencoder whose codes masked pre-training then guesses: `dvae.py:PATCH,DATASET`.

python -m keras_vit.main --workdir=/tmp/codes --config=keras_vit/configs/dvae.py:8,digits
python -m keras_vit.main --workdir=/tmp/mim --config=keras_vit/configs/mim.py:ViT_mu,digits \
    --config.masked.tokenizer=/tmp/codes/model.keras

PATCH is the side of a patch in pixels, which with --config.pp.crop must give as many patches as the model to be pre-trained has;
DATASET `digits`, a folder or a TFDS name. The loss is that of DALL-E (arXiv 2102.12092): pixels through codes drawn at a
temperature that falls from 1 to 1/16, and a divergence that keeps codes in use. The values are this package's own.
"""

import ml_collections

from keras_vit import errors
from keras_vit.configs import common


def get_config(patch_dataset=""):
    patch, _, dataset = patch_dataset.partition(",")
    if not patch.isdigit() or not int(patch) or not dataset:
        raise errors.ConfigError(f"dvae.py expects PATCH,DATASET as in dvae.py:8,digits, got {patch_dataset!r}.")
    config = common.with_dataset(common.get_config(), dataset, resolution=224, patch=int(patch))
    with config.unlocked():
        config.trainer, config.export, config.pretrained_dir = "tokenizer", False, ""
        # Codes, channels, convolutions of encoder and of decoder, and the weight of the divergence.
        config.dvae = ml_collections.ConfigDict(dict(patch_size=int(patch), vocabulary=64, width=64, depth=2, divergence=0.01))
        config.model = ml_collections.ConfigDict(dict(model_name="dVAE"))
        config.optimizer, config.optim_dtype, config.base_lr = "adamw", "float32", 1e-3
        config.batch, config.accum_steps = 128, 1
    return config.lock()
