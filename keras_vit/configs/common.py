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
    # Every so many steps: test accuracy; a line of progress; model.keras, model.npz and the state. 0: only at the end.
    config.eval_every = 100
    config.progress_every = 10
    config.checkpoint_every = 1_000

    # Batches prepared ahead.
    config.prefetch = 2

    # Learning rate after the warm-up, its decay ('cosine', 'linear' or 'rsqrt') to the last step, and the steps of warm-up.
    config.base_lr = 0.03
    config.decay_type = "cosine"
    config.warmup_steps = 500
    # Ours: where 'linear' ends; steps after which 'rsqrt' is base_lr / sqrt(2); last steps, in which any of them falls to 0.
    config.linear_end = 1e-5
    config.timescale = 10_000
    config.cooldown_steps = 0

    # 'train'. inference_time.py has the original's other one.
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
    # RandAugment and Mixup as a level of AugReg: 'none', 'light1', 'light2', 'medium1', 'medium2', 'strong1', 'strong2'.
    config.augreg = "none"
    # Instead of a level, timm's RandAugment: (operations, magnitude, its standard deviation), such as (2, 9.0, 0.5); () for none.
    config.randaugment = ()
    # How many times in a row an image of an epoch is taken, each time augmented anew; an epoch has as many examples as before.
    config.repeats = 1
    # Instead of a level, or beyond it: Mixup's and CutMix's alpha, and the probability of random erasing.
    config.mixup = 0.0
    config.cutmix = 0.0
    config.erasing = 0.0
    # Share of the label that is spread evenly over all classes.
    config.label_smoothing = 0.0
    # 'softmax': cross-entropy; 'sigmoid': binary cross-entropy summed over the classes, as AugReg pre-trains.
    config.loss = "softmax"
    # Initial bias of a new head: near -log(classes) with 'sigmoid', where all but one label of an image are 0.
    config.head_bias = 0.0
    # Stochastic depth: probability that an image skips a branch of the last block, falling linearly to 0 at the first.
    config.stochastic_depth_rate = 0.0
    # Spread of the position table when starting from random weights; None is the family's own, 0.02.
    config.position_stddev = placeholder(float)
    # 'sgd' is the original's, with momentum 0.9; 'adamw'; 'adafactor' in big_vision's form.
    config.optimizer = "sgd"
    # Decoupled weight decay of kernels, multiplied by the schedule's course and not by base_lr, as big_vision does it.
    config.weight_decay = 0.0
    # Learning rates of layers: a factor per block counted from the head (1.0: all alike), and before it 'PATTERN=FACTOR' rules,
    # of which the first that fits a weight's path counts: ('block_0/*=0.1',); ('head/*=1', '*=0') trains the head alone.
    config.layer_decay = 1.0
    config.lr_rules = ()
    # Moving average of the weights, evaluated and stored in their place; 0 for none.
    config.ema = 0.0
    # Distillation: 'none', 'soft' (at temperature tau) or 'hard'; alpha is the teacher's share of the loss. The teacher is
    # VARIANT:WEIGHTS, a .keras file or the folder of a TF-Hub module; with `cache`, a .npz file, its logits of the images as test
    # images are prepared are computed once and kept there. See docs/training.md.
    config.distillation = ml_collections.ConfigDict(dict(type="none", tau=1.0, alpha=0.5, teacher="", cache=""))
    # 'none', 'sam' or 'gsam'; how far they move the weights, gsam from rho at base_lr to rho_min where the decay ends; its alpha.
    config.two_pass = "none"
    config.rho = 0.05
    config.rho_min = 0.01
    config.gsam_alpha = 0.4
    # 'float32', 'mixed_bfloat16' or 'mixed_float16' (whose loss is scaled).
    config.precision = "float32"
    # Whether blocks are computed again in the backward pass instead of kept in memory.
    config.remat = False
    # Where to train: see training/strategy.py. 'auto', 'one_device'; TensorFlow: 'mirrored', 'multi_worker', 'tpu'; JAX:
    # 'data_parallel', 'model_parallel' over config.model_axis devices. steps_on_device: updates of one call, for TPUs.
    config.strategy = "auto"
    config.model_axis = placeholder(int)
    config.steps_on_device = 1
    # The whole state is saved every checkpoint_every steps; so many are kept. A run that is started again goes on from there.
    config.keep_checkpoints = 2
    # What to do when a checkpoint cannot be written: 'stop' or 'continue'.
    config.on_save_error = "stop"
    # Keys that may differ from those of the run that is continued, such as ('dataset', 'version.keras').
    config.allow_change = ()
    # Steps to profile, 'FIRST,LAST'.
    config.profile = ""
    # So many training images are evaluated at the end, with the evaluation's preprocessing; 0 for none.
    config.train_sample = 0
    # What to do with images that cannot be read: 'raise', or 'skip' up to a hundredth of them.
    config.on_error = "raise"
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
