r"""Trains a ViT or hybrid from random weights as "How to train your ViT?" (arXiv 2106.10270): `pretrain.py:MODEL,RECIPE[,LEVEL]`.

python -m keras_vit.main --workdir=/tmp/s16 --config=keras_vit/configs/pretrain.py:s16,imagenet2012 --config.tfds_data_dir=/data

MODEL is a name of vit.py; RECIPE imagenet2012 or imagenet21k; LEVEL how strong the augmentation is, a key of
`data.augment.LEVELS`: where it is left out, what the recipe says for the model. The values are those of
google-research/big_vision, configs/vit_i1k.py and configs/vit_i21k.py: 300 epochs in batches of 4,096, Adam with its first moment
in bfloat16, sigmoid loss, a decoupled weight decay of 0.0001. That is 0.1 times the learning rate, the "wd_0.1" of the published
files; for their "wd_0.03" pass --config.weight_decay=0.00003.

- For dropout and stochastic depth, which paper and files have at 0 or at 0.1 both and big_vision's configurations lack:
  --config.model.transformer.dropout_rate=0.1 --config.stochastic_depth_rate=0.1
- The model is that of the published files: class token, no `pre_logits`. vit_i21k.py reads the mean of the tokens
  (MODEL=b16_gap_norep), vit_i1k.py has `pre_logits` (--config.model.representation_size=768 for B/16).
- There, test images are resized to 256 on their shorter side and cut at their centre to 224; here they are resized to 224 x 224.
- TFDS has no imagenet21k. A folder with a part of its own to test on: --config.dataset=FOLDER --config.pp.train=train
  --config.pp.test=test. A folder gives an image one label, big_vision's data all that its duplicates have.
- For other data or epochs: --config.total_steps.
"""

import ml_collections

from keras_vit import errors
from keras_vit.configs import common, models
from keras_vit.data.augment import LEVELS

# Images of one epoch. imagenet2012: 99% of 1,281,167. imagenet21k: "approximately 12.4M" without duplicates, as an author says in
# google-research/vision_transformer#28; nothing published says it more exactly.
IMAGES = {"imagenet2012": 1_268_355, "imagenet21k": 12_400_000}
RECIPES = {
    "imagenet2012": dict(
        head_bias=-6.9, eval_every=2_500, pp=dict(train="train[:99%]", test="validation"),
        levels=dict(Ti16="light1", S32="medium1", S16="medium2", B32="medium2", B16="medium2", L16="medium2"),
    ),
    "imagenet21k": dict(
        head_bias=-10.0, eval_every=1_000, pp=dict(train="full[51200:]", test="full[:25600]"),
        levels=dict(Ti16="none", S32="none", S16="light1", B32="light2", B16="light2", L16="medium2"),
    ),
}  # fmt: skip


def steps(dataset, epochs, batch):
    """Updates in so many epochs, rounded as in big_vision."""
    return round(epochs * IMAGES[dataset] / batch)


def adam(recipe="imagenet2012"):
    """What big_vision's ways of training from random weights have in common.

    Args:
        recipe: a key of `RECIPES`, which is also the name of the data set.
    """
    config, given = ml_collections.ConfigDict(common.get_config()), RECIPES[recipe]
    with config.unlocked():
        config.pretrained_dir = ""
        config.dataset = recipe
        config.pp = ml_collections.ConfigDict({**given["pp"], "crop": 224})
        config.loss, config.head_bias = "sigmoid", given["head_bias"]
        config.optimizer, config.base_lr, config.weight_decay = "adamw", 0.001, 0.0001
        config.warmup_steps = 10_000
        config.batch = 4_096
        config.total_steps = steps(recipe, 300, config.batch)
        config.shuffle_buffer = 250_000
        config.eval_every, config.progress_every = given["eval_every"], 50
    return config


def get_config(model_recipe_level=""):
    model, recipe, level = (*model_recipe_level.split(","), "", "")[:3]
    if recipe not in RECIPES:
        raise errors.ConfigError(
            f"pretrain.py expects MODEL,RECIPE[,LEVEL] as in pretrain.py:s16,imagenet2012, RECIPE one of {', '.join(RECIPES)}; "
            f"got {model_recipe_level!r}. Other data are chosen by --config.dataset and --config.pp."
        )
    row = models.find_row(model, models.rows())
    level = level or RECIPES[recipe]["levels"].get(row.name.removeprefix("ViT_").removesuffix("_gap"))
    if level not in LEVELS:
        raise errors.ConfigError(
            f"pretrain.py:{model_recipe_level}: expected a level of {', '.join(LEVELS)}, got {level!r}; "
            f"write pretrain.py:{model},{recipe},LEVEL."
        )
    config = adam(recipe)
    with config.unlocked():
        models.use_row(config, row)
        if config.model_type == "ViT":
            config.model.transformer.dropout_rate = 0.0
        config.augreg = level
    return config.lock()
