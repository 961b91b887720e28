r"""Fine-tunes a Vision Transformer, hybrid or Mixer: `vit.py:MODEL,DATASET`.

python -m keras_vit.main --workdir=/tmp/vit --config=keras_vit/configs/vit.py:b16,cifar10 \
    --config.pretrained_dir='gs://vit_models/imagenet21k'

MODEL is a key of the original (ti16, s16, s32, b8, b16, b32, l16, l32, h14, s16_gap_norep, r_ti16, r26_s32, r50_b16, r50_l32,
mixer_b16, ...), its file name (ViT-B_16, R50+ViT-B_16) or a name of `keras_vit.list_models()`. A Mixer's weights fit one size of
images, which takes the place of the data set's. DATASET is one of `common.DATASET_PRESETS`, a folder, or any TFDS name.
"""

from keras_vit import errors
from keras_vit.configs import common, models


def get_config(model_dataset=""):
    model, _, dataset = model_dataset.partition(",")
    if not dataset:
        raise errors.ConfigError(f"vit.py expects MODEL,DATASET as in vit.py:b16,cifar10, got {model_dataset!r}.")
    row = models.find_row(model, models.rows())
    config = common.with_dataset(
        common.get_config(), dataset, resolution=row.resolution, patch=row.arguments.get("patch_size", 1)
    )
    with config.unlocked():
        models.use_row(config, row)
        if config.model_type == "Mixer":
            config.pp.crop = row.resolution
        if config.model.model_name == "ViT-B_16" and dataset == "cifar10":
            config.base_lr = 0.01
    return config.lock()
