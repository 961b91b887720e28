"""What every configuration has: the keys of google-research/vision_transformer `vit_jax/configs/common.py`, then ours."""

import ml_collections
from ml_collections.config_dict import placeholder

# What a name says of a data set besides itself; `crop` is taken in whole patches (384 is no multiple of 14).
DATASET_PRESETS = {
    "cifar10": dict(total_steps=10_000, pp=dict(train="train[:98%]", test="test", crop=384)),
    "cifar100": dict(total_steps=10_000, pp=dict(train="train[:98%]", test="test", crop=384)),
    "imagenet2012": dict(total_steps=20_000, pp=dict(train="train[:99%]", test="validation", crop=384)),
    "digits": dict(total_steps=1_000, warmup_steps=100, augment="shift", pp=dict(train="train", test="test", crop=32)),
}


def get_config():
    """Everything but the model and the data set. A `placeholder` is None until a value of that type is given."""
    config = ml_collections.ConfigDict()

    # Where the original checkpoint lies: a folder, gs:// or https:// URL with {model_name}.npz, such as
    # gs://vit_models/imagenet21k. None or '' trains from random weights.
    config.pretrained_dir = "."
    # 'digits', a folder {train,test}/<class>/<image>, or a TFDS name; set by `with_dataset`.
    config.dataset = placeholder(str)
    # Where TFDS finds files downloaded by hand, and where it keeps its data sets.
    config.tfds_manual_dir = placeholder(str)
    config.tfds_data_dir = placeholder(str)
    # Exactly so many updates are made.
    config.total_steps = placeholder(int)

    # The gradient is scaled down to this global norm; 0 leaves it alone.
    config.grad_norm_clip = 1.0
    # In which the momentum is kept: 'bfloat16' or 'float32'.
    config.optim_dtype = "bfloat16"
    # In how many parts a batch goes through the model, to save memory. The update is that of the whole batch.
    config.accum_steps = 8

    # Images of an update, and at once in evaluation.
    config.batch = 512
    config.batch_eval = 512
    # Encoded examples of a TFDS data set held for shuffling; digits and folders shuffle the whole epoch.
    config.shuffle_buffer = 50_000
    # Every so many steps: test accuracy; a line of progress; model.keras and model.npz are stored. 0: only at the end.
    config.eval_every = 100
    config.progress_every = 10
    config.checkpoint_every = 1_000

    # Batches prepared ahead.
    config.prefetch = 2

    # Learning rate after the warm-up, its decay ('cosine' or 'linear') to the last step, and the steps of warm-up.
    config.base_lr = 0.03
    config.decay_type = "cosine"
    config.warmup_steps = 500

    # Only 'train'.
    config.trainer = "train"

    # Set by the other configurations: 'ViT' (hybrids too) or 'Mixer'; a model of that type, see models.py; in augreg.py its
    # AugReg name or file name; preprocessing.
    config.model_type = "ViT"
    config.model = None
    config.model_or_filename = placeholder(str)
    config.pp = None

    # Ours, beyond the original's:
    # Initial weights, order of the data, augmentation and dropout follow from it.
    config.seed = 0
    # 'crop_flip' is the original's inception crop and flip; 'shift' moves by up to an eighth of the side; 'none'.
    config.augment = "crop_flip"
    # Share of the label that is spread evenly over all classes.
    config.label_smoothing = 0.0
    # Spread of the position table when starting from random weights; None is the family's own, 0.02.
    config.position_stddev = placeholder(float)
    # Whether to export a TF-Hub module and evaluate it in another process, on the CPU, on the whole test split.
    config.export = True
    return config.lock()


def with_dataset(config, dataset, *, resolution, patch):
    """A copy of `config` for a data set: its preset, else splits 'train' and 'test' at the model's own resolution.

    Without a preset, training takes 500 steps with 100 of warm-up, as in augreg.py.

    Args:
        config: of `get_config`.
        dataset: name or folder.
        resolution: side of the images where the data set has no preset, in pixels.
        patch: side of the model's patches.
    """
    unknown = dict(total_steps=500, warmup_steps=100, pp=dict(train="train", test="test", crop=resolution))
    preset = DATASET_PRESETS.get(dataset, unknown)
    config = ml_collections.ConfigDict(config)
    with config.unlocked():
        config.dataset = dataset
        config.update({key: value for key, value in preset.items() if key != "pp"})
        config.pp = ml_collections.ConfigDict(preset["pp"])
        config.pp.crop -= config.pp.crop % patch
    return config.lock()
