r"""Trains a ViT from random weights on ImageNet-1k by GSAM (arXiv 2203.08065), without strong augmentation: `gsam.py:MODEL`.

python -m keras_vit.main --workdir=/tmp/gsam --config=keras_vit/configs/gsam.py:b32_gap_norep --config.tfds_data_dir=/data

MODEL is a name of vit.py; without one it is that of the configuration whose values these are, google-research/big_vision,
configs/proj/gsam/vit_i1k_gsam_no_aug.py: a ViT-B/32 that reads the mean of its tokens. That file has the same rho and alpha for
every model. There, each device moves the weights by the gradient of its own images; here that of the whole batch moves them all.
How test images are prepared differs as in pretrain.py.
"""

from keras_vit.configs import models, pretrain


def get_config(model=""):
    row = models.find_row(model or "b32_gap_norep", models.rows())
    config = pretrain.adam()
    with config.unlocked():
        models.use_row(config, row)
        config.head_bias = -10.0
        config.optim_dtype = "float32"
        config.base_lr, config.weight_decay = 0.003, 0.001
        config.decay_type, config.linear_end = "linear", 0.01 * config.base_lr
        config.two_pass, config.rho, config.rho_min, config.gsam_alpha = "gsam", 0.6, 0.1, 0.6
        if config.model_type == "ViT":
            config.model.transformer.dropout_rate = 0.0
    return config.lock()
