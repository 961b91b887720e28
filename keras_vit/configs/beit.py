r"""Fine-tunes on ImageNet-1k what was pre-trained by masks, as BEiT (arXiv 2106.08254): `beit.py:MODEL`.

python -m keras_vit.main --workdir=/tmp/tuned --config=keras_vit/configs/beit.py:BEiT_B16 --config.tfds_data_dir=/data \
    --config.pretrained_dir=/tmp/start.npz
python -m keras_vit.main --workdir=/tmp/tuned --config=keras_vit/configs/beit.py:b16 --config.tfds_data_dir=/data \
    --config.pretrained_dir=/tmp/mim/model.npz

MODEL is any name of `keras_vit.list_models()`, here or upstream; `pretrained_dir` a file, such as mim.py leaves. Masked models as
released share their relative positions between blocks, so that their files do not load into a classifier: give one what they know
by `keras_vit.models.beit.start_from`, and store it by `keras_vit.save_npz`, here as /tmp/start.npz. The values are those of
microsoft/unilm, beit/get_started_for_image_classification.md, for models that saw no labels before: base 100 epochs, 20 of them
warm-up, at 0.004, layer decay 0.65, stochastic depth 0.1; large 50 epochs, 5 of them warm-up, at 0.001, 0.75 and 0.2. Batches of
1,024, weight decay 0.05, and RandAugment, Mixup, CutMix, random erasing and label smoothing as in deit.py.
"""

from keras_vit.configs import deit, models

BASE = dict(epochs=100, warmup=20, rate=4e-3, drop_path=0.1), 0.65
LARGE = dict(epochs=50, warmup=5, rate=1e-3, drop_path=0.2), 0.75


def get_config(model=""):
    row = models.find_row(model or "BEiT_B16", models.rows())
    values, layer_decay = LARGE if row.arguments.get("width", 0) >= 1024 else BASE
    config = deit.recipe(row.name, batch=1_024, **values)
    with config.unlocked():
        config.layer_decay, config.pretrained_dir = layer_decay, "."
    return config.lock()
