r"""Trains a model from random weights on ImageNet-1k as DeiT (arXiv 2012.12877), with or without a teacher: `deit.py:MODEL`.

python -m keras_vit.main --workdir=/tmp/deit --config=keras_vit/configs/deit.py:s16 --config.tfds_data_dir=/data
python -m keras_vit.main --workdir=/tmp/taught --config=keras_vit/configs/deit.py:s16 --config.tfds_data_dir=/data \
    --config.distillation.type=hard --config.distillation.teacher=teacher.keras

MODEL is any name of `keras_vit.list_models()`, here or upstream. The values are those of facebookresearch/deit, main.py and
README: 300 epochs in batches of 1,024, AdamW at 0.0005 * batch / 512 with weight decay 0.05 and 5 epochs of warm-up, stochastic
depth 0.1, every image three times in a row (repeated augmentation), RandAugment "m9-mstd0.5-inc1", Mixup 0.8 or CutMix 1.0 with
equal probability, random erasing 0.25 with noise, label smoothing 0.1, a moving average of the weights by 0.99996, no clipping.
With a teacher the paper takes type "hard" and alpha 0.5.

- The crop takes 5% to 100% of an image and resizes bilinearly, the original's 8% to 100% bicubically; a box that is erased has up
  to 0.4 of the image, there up to a third; the learning rate ends at 0, there at 0.00001.
- A larger model, or DeiT's 384 pixels, needs --config.stochastic_depth_rate and --config.pp.crop; for other data or epochs:
  --config.dataset, --config.pp, --config.total_steps.
"""

import ml_collections

from keras_vit.configs import common, models

IMAGES = 1_281_167  # of one epoch of imagenet2012


def recipe(model, *, epochs, warmup, batch, rate, decay=0.05, drop_path=0.1):
    """What the recipes of timm's descendants have in common: ImageNet-1k, AdamW, strong augmentation.

    Args:
        model: a name of a registered row.
        epochs, warmup: epochs in all, and of them for the warm-up.
        batch, rate, decay: the weight decay is PyTorch's, multiplied by the learning rate.
        drop_path: stochastic depth of the last block.
    """
    row, config = models.find_row(model, models.rows()), ml_collections.ConfigDict(common.get_config())
    with config.unlocked():
        models.use_row(config, row)
        if config.model_type == "ViT":
            config.model.transformer.dropout_rate = 0.0
        config.pretrained_dir, config.dataset = "", "imagenet2012"
        config.pp = ml_collections.ConfigDict(dict(train="train", test="validation", crop=row.resolution))
        config.batch, config.shuffle_buffer = batch, 250_000
        config.total_steps, config.warmup_steps = (epoch * (IMAGES // batch) for epoch in (epochs, warmup))
        config.eval_every, config.progress_every = IMAGES // batch, 50
        config.optimizer, config.optim_dtype = "adamw", "float32"
        config.base_lr, config.weight_decay = rate, rate * decay
        config.grad_norm_clip, config.stochastic_depth_rate = 0.0, drop_path
        config.randaugment = (2, 9.0, 0.5)
        config.mixup, config.cutmix, config.erasing, config.label_smoothing = 0.8, 1.0, 0.25, 0.1
    return config


def get_config(model=""):
    config = recipe(model or "s16", epochs=300, warmup=5, batch=1_024, rate=5e-4 * 1_024 / 512)
    with config.unlocked():
        config.repeats, config.ema = 3, 0.99996
    return config.lock()
