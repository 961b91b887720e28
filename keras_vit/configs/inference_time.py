r"""Measures how many images a model classifies in a second: `inference_time.py[:MODEL]`.

python -m keras_vit.main --workdir=/tmp/speed --config=keras_vit/configs/inference_time.py:ViT-B_16 --config.batch=8

MODEL, or --config.model_name, is a name of vit.py or of `keras_vit.list_models()`. The keys are the original's, which has no
defaults for batch, num_classes and image_size.
"""

import ml_collections


def get_config(model_name="ViT-B_32"):
    config = ml_collections.ConfigDict()

    # Measures; the original calls this key `train`, but looks for `trainer`.
    config.trainer = "inference_time"
    config.model_name = model_name
    # Kept for the original's command lines; nothing reads it there either. Results go to --workdir.
    config.log_dir = "."

    # Batches that are measured (the original measures initial_steps of them), and batches before.
    config.steps = 30
    config.initial_steps = 10

    # Images at once, classes to tell apart, and side of the images in pixels; 0 is the model's own.
    config.batch = 8
    config.num_classes = 1_000
    config.image_size = 0

    # Ours: 'float32', 'mixed_bfloat16' or 'mixed_float16'.
    config.precision = "float32"
    return config.lock()
