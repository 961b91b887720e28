r"""Fine-tunes from a checkpoint of "How to train your ViT?" (arXiv 2106.10270), ViTs and hybrids: `augreg.py:MODEL_OR_FILENAME`.

python -m keras_vit.main --workdir=/tmp/vit --config=keras_vit/configs/augreg.py:R_Ti_16 \
    --config.dataset=oxford_iiit_pet --config.pp.train='train[:90%]' --config.base_lr=0.01

A model's name (Ti_16, S_16, B_16, R_Ti_16, R50_L_32, ...) stands for its recommended ImageNet-21k file, that of the highest
`final_val`; any other of the 50,000 files is given by its full name without ".npz", here or as --config.model_or_filename.
"""

import ml_collections

from keras_vit import errors
from keras_vit.checkpoints import augreg
from keras_vit.configs import common, models


def get_config(model_or_filename=""):
    rows, fields = models.augreg_rows(), augreg.parse(model_or_filename)
    if "-" in model_or_filename and fields is None:
        raise errors.ConfigError(
            f"augreg.py: {model_or_filename!r} is no AugReg file name; expected one such as "
            "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0."
        )
    row = models.find_row(fields["model"] if fields else model_or_filename, rows)
    config = ml_collections.ConfigDict(common.get_config())
    with config.unlocked():
        config.pretrained_dir = "gs://vit_models/augreg"
        config.model_or_filename = model_or_filename
        models.use_row(config, row)
        config.model.transformer.dropout_rate = 0.0  # pre-training had regularisation enough
        config.total_steps = 500
        config.warmup_steps = 100
        # `resize` is kept for the original's command lines. As in the original at this commit, nothing reads it: images are
        # resized straight to `crop`.
        config.pp = ml_collections.ConfigDict(dict(train="train", test="test", resize=448, crop=384))
        config.dataset = ""  # to be given on the command line
    return config.lock()
