r"""LiT-tuning: a text tower learns what a locked image tower sees (arXiv 2111.07991): `lit.py:MODEL,DATASET`.

python -m keras_vit.main --workdir=/tmp/lit --config=keras_vit/configs/lit.py:LiT_B16B_2,coco_captions \
    --config.tfds_data_dir=/data --config.contrastive.image_weights=gs://vit_models/augreg/FILE.npz
python -m keras_vit.main --workdir=/tmp/lit --config=keras_vit/configs/lit.py:LiT_mu,captions --config.contrastive.towers=uu

MODEL is a LiT of `keras_vit.list_models()`; DATASET a folder of images with captions (with `train` and `test` in it, see
data/captions.py) or a TFDS name. The values are those of google-research/big_vision, configs/proj/image_text/lit_coco.py: batches
of 4,096 for 5,000 steps, 150 of them warm-up, Adam at 0.001 (Adafactor where the text tower is a BERT-large), weight decay 0.01,
gradients clipped to 1, temperature 10 at first, the image tower locked. That file says of itself that it is a demonstration: the
released models saw CC12M and YFCC100M. It also flips images and draws two operations of RandAugment; here images are as they are,
so that those of a locked tower are embedded once and not in every step.

SigLIP's loss (arXiv 2303.15343): --config.loss=sigmoid --config.model.bias=-10.0.
"""

import ml_collections
from ml_collections.config_dict import placeholder

from keras_vit import errors
from keras_vit.configs import common, models

# Of the published text towers: BERT's vocabulary for those of its wiring, beside the released model for the plain ones
VOCABULARIES = {"bert": "gs://vit_models/lit/LiT-B16B.txt", "transformer": "gs://vit_models/lit/LiT-L16S.model"}


def contrastive(**given):
    """What `config.contrastive` has; see the comments."""
    config = ml_collections.ConfigDict()
    # The image tower's letter, then the text tower's: L locked, U trained from pre-trained weights, u from random ones. A locked
    # tower is locked up to the linear map at its end, if it has one.
    config.towers = "Lu"
    # Weights of each tower by itself (a file of both is config.pretrained_dir): for images of a ViT or a LiT.
    config.image_weights, config.text_weights = "", ""
    # What an image's caption is for another image of the batch with the same one: 'negative', wrong, as in the original; or
    # 'positive', as right as its own.
    config.duplicates = "negative"
    # A .npz file for what a locked image tower makes of the training images, where they are not augmented; '' for memory.
    config.cache = ""
    # Where a TFDS data set has its captions, such as 'captions/text'.
    config.text = ""
    # For a data set of classes, what is said of them: sentences with {}, and names in place of the data set's own.
    config.prompts, config.class_names = (), ()
    config.update(given)
    return config


def get_config(model_dataset=""):
    model, _, dataset = model_dataset.partition(",")
    rows = {name: row for name, row in models.rows().items() if row.family.name == "LiT"}
    if not dataset:
        raise errors.ConfigError(f"lit.py expects MODEL,DATASET as in lit.py:LiT_B16B_2,coco_captions, got {model_dataset!r}.")
    row = models.find_row(model, rows)
    config = ml_collections.ConfigDict(common.get_config())
    with config.unlocked():
        models.use_row(config, row)
        config.trainer, config.export, config.pretrained_dir, config.dataset = "contrastive", False, "", dataset
        if "vocabulary" not in config.model:
            config.model.vocabulary = VOCABULARIES[row.arguments["text_model"]]
        if "bias" not in config.model:
            config.model.bias = placeholder(float)
        test = "val" if dataset == "coco_captions" else "test"
        config.pp = ml_collections.ConfigDict(dict(train="train", test=test, crop=row.resolution))
        config.contrastive = contrastive(text="captions/text" if dataset == "coco_captions" else "")
        config.augment, config.accum_steps = "none", 1
        config.batch, config.total_steps, config.warmup_steps = 4_096, 5_000, 150
        config.base_lr, config.weight_decay, config.grad_norm_clip = 1e-3, 0.01, 1.0
        config.optimizer = "adafactor" if row.arguments["text_width"] == 1024 else "adamw"
        config.optim_dtype = "float32"
        config.shuffle_buffer, config.eval_every = 250_000, 500
    return config.lock()
