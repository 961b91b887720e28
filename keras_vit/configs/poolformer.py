r"""Trains a PoolFormer from random weights on ImageNet-1k as its authors (arXiv 2111.11418): `poolformer.py:MODEL`.

python -m keras_vit.main --workdir=/tmp/s12 --config=keras_vit/configs/poolformer.py:poolformer_s12 --config.tfds_data_dir=/data

MODEL is any name of `keras_vit.list_models()`, here or upstream. The values are those of sail-sg/poolformer, README and train.py:
300 epochs in batches of 1,024, AdamW at 0.001 * batch / 1,024 with weight decay 0.05 and 5 epochs of warm-up, stochastic depth
by the model's size, RandAugment, Mixup, CutMix, random erasing and label smoothing as in deit.py, no repeated augmentation, no
moving average. There, 10 epochs follow at a learning rate of 0.00001, where the schedule ends; what else differs is what deit.py
says. With another batch pass --config.base_lr and, in proportion, --config.weight_decay.
"""

from keras_vit.configs import deit, models

DROP_PATH = {"S12": 0.1, "S24": 0.1, "S36": 0.2, "M36": 0.3, "M48": 0.4}  # README, 4. Train


def get_config(model=""):
    model = model or "poolformer_s12"
    size = models.find_row(model, models.rows()).name.rpartition("_")[2]
    config = deit.recipe(model, epochs=300, warmup=5, batch=1_024, rate=1e-3, drop_path=DROP_PATH.get(size, 0.1))
    return config.lock()
