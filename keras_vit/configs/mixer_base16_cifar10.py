r"""Fine-tunes a Mixer-B/16 on CIFAR-10; for other models and data sets: `vit.py:mixer_l16,cifar100`.

python -m keras_vit.main --workdir=/tmp/mixer --config=keras_vit/configs/mixer_base16_cifar10.py \
    --config.pretrained_dir='gs://mixer_models/imagenet21k'
"""

from keras_vit.configs import vit


def get_config():
    return vit.get_config("mixer_b16,cifar10")
