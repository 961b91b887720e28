r"""Trains a ViT-S/16 from random weights as "Better plain ViT baselines for ImageNet-1k" (arXiv 2205.01580): 90 epochs.

python -m keras_vit.main --workdir=/tmp/s16 --config=keras_vit/configs/vit_s16_i1k.py --config.tfds_data_dir=/data

The values are those of google-research/big_vision, configs/vit_s16_i1k.py. For its 300 epochs: --config.total_steps=371588. How
test images are prepared differs as in pretrain.py.
"""

from keras_vit import zoo
from keras_vit.configs import models, pretrain


def get_config():
    config = pretrain.adam()
    with config.unlocked():
        models.use_row(config, zoo.VARIANTS["ViT_S16_bv"])
        config.loss, config.head_bias = "softmax", 0.0
        config.augreg = "light2"  # randaug(2,10) and Mixup 0.2
        config.batch = 1_024
        config.total_steps = pretrain.steps(config.dataset, 90, config.batch)
    return config.lock()
