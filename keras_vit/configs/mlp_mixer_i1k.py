r"""Trains a Mixer-B/16 (arXiv 2105.01601) from random weights on ImageNet-1k: 300 epochs.

python -m keras_vit.main --workdir=/tmp/mixer --config=keras_vit/configs/mlp_mixer_i1k.py --config.tfds_data_dir=/data

The values are those of google-research/big_vision, configs/mlp_mixer_i1k.py. For its short run of 60 epochs:
--config.total_steps=18579. There, a branch that stochastic depth keeps is not scaled up; here it is, as in all other models. How
test images are prepared differs as in pretrain.py.
"""

from keras_vit import zoo
from keras_vit.configs import models, pretrain


def get_config():
    config = pretrain.adam()
    with config.unlocked():
        models.use_row(config, zoo.VARIANTS["Mixer_B16"])
        config.augreg = "medium2"  # randaug(2,15) and Mixup 0.5
        config.stochastic_depth_rate = 0.1
        config.optim_dtype = "float32"
        config.decay_type, config.linear_end = "linear", 1e-5 * config.base_lr
    return config.lock()
