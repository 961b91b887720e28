"""A toy LiT learns scikit-learn's digits from sentences such as "a photo of the digit seven", without a network, in minutes.

python -m keras_vit.main --workdir=runs/lit --config=lit_digits.py

Both towers start from random weights. Of 64 images several show the same digit, so that their sentences are right for each other.
"""

import ml_collections

from keras_vit import zoo
from keras_vit.configs import common, lit, models

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = ("a photo of the digit {}", "a picture of the number {}", "the digit {}", "{}")


def get_config():
    config = ml_collections.ConfigDict(common.get_config())
    with config.unlocked():
        models.use_row(config, zoo.VARIANTS["LiT_mu"])
        config.model.bias, config.model.patch_size = ml_collections.config_dict.placeholder(float), 8
        config.trainer, config.export, config.pretrained_dir, config.dataset = "contrastive", False, "", "digits"
        config.pp = ml_collections.ConfigDict(dict(train="train", test="test", crop=32))
        config.contrastive = lit.contrastive(towers="uu", duplicates="positive", prompts=PROMPTS, class_names=NAMES)
        config.augment, config.accum_steps = "shift", 1
        config.position_stddev = 0.5  # see digits.py
        config.batch, config.total_steps, config.warmup_steps = 64, 600, 60
        config.optimizer, config.optim_dtype, config.base_lr, config.weight_decay = "adamw", "float32", 3e-3, 1e-4
    return config.lock()
