r"""Pre-trains a ViT on images without labels, by guessing hidden patches (BEiT, arXiv 2106.08254): `mim.py:MODEL,DATASET`.

python -m keras_vit.main --workdir=/tmp/mim --config=keras_vit/configs/mim.py:b16,imagenet2012 --config.tfds_data_dir=/data
python -m keras_vit.main --workdir=/tmp/tuned --config=keras_vit/configs/beit.py:b16 \
    --config.pretrained_dir=/tmp/mim/model.npz --config.tfds_data_dir=/data

MODEL is a name of vit.py that cuts images into patches; DATASET `digits`, a folder {train,test}/<class>/<image> (one class will
do, its name means nothing) or a TFDS name. Values are those of microsoft/unilm, beit/README.md, for BEiT-base on ImageNet-1k:
batches of 2,048 for 800 epochs, 10 of them warm-up, AdamW at 0.0015 with weight decay 0.05, gradients clipped to 3, stochastic
depth 0.1. Other data: as many steps as in vit.py, and the learning rate for their batch of 512.

- The targets are pixels, by L1, as in SimMIM (arXiv 2111.09886). --config.masked.tokenizer=TOKENIZER.keras guesses the codes of a
  model instead, as BEiT does those of DALL-E's: a registered variant or a `.keras` file that maps images to logits (b, h, w,
  vocabulary) for as many patches.
- BEiT's second view for the tokenizer and its colour jitter are not here.
"""

import ml_collections

from keras_vit import errors
from keras_vit.configs import common, models, pretrain

RATE, BATCH, DECAY = 1.5e-3, 2_048, 0.05


def get_config(model_dataset=""):
    model, _, dataset = model_dataset.partition(",")
    if not dataset:
        raise errors.ConfigError(f"mim.py expects MODEL,DATASET as in mim.py:b16,imagenet2012, got {model_dataset!r}.")
    row = models.find_row(model, models.rows())
    config = common.with_dataset(common.get_config(), dataset, resolution=row.resolution, patch=row.arguments["patch_size"])
    with config.unlocked():
        models.use_row(config, row)
        config.trainer, config.export, config.pretrained_dir = "masked", False, ""
        config.optimizer, config.optim_dtype, config.grad_norm_clip = "adamw", "float32", 3.0
        config.stochastic_depth_rate = 0.1
        if config.model_type == "ViT":
            config.model.transformer.dropout_rate = 0.0
        if dataset == "imagenet2012":
            config.pp.crop, config.batch = row.resolution, BATCH
            config.total_steps, config.warmup_steps = (pretrain.steps(dataset, epochs, BATCH) for epochs in (800, 10))
        config.base_lr = RATE * config.batch / BATCH
        config.weight_decay = config.base_lr * DECAY  # which is not multiplied by base_lr
        # The share of patches that is hidden, 75 of BEiT's 196; patches of the smallest block; 'pixels', or the model whose codes
        # are to be guessed.
        patches = (config.pp.crop // row.arguments["patch_size"]) ** 2
        least = max(1, min(16, patches * 16 // 196))
        config.masked = ml_collections.ConfigDict(dict(ratio=75 / 196, least=least, tokenizer="pixels"))
    return config.lock()
