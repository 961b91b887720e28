r"""Trains a ViT from random weights on ImageNet-1k by SAM (arXiv 2010.01412), without strong augmentation: `sam.py:MODEL`.

python -m keras_vit.main --workdir=/tmp/sam --config=keras_vit/configs/sam.py:b16 --config.tfds_data_dir=/data

That is how "When Vision Transformers Outperform ResNets without Pre-training" (arXiv 2106.01548) trains. MODEL is a name of
vit.py, by default b16. The GSAM paper (arXiv 2203.08065) takes the same learning rate and weight decay for both methods, so these
are those of gsam.py; the loss is softmax's, as the heads of the published files are. rho is 0.2, with which ViT-B/16 was tried in
google-research/vision_transformer#153; for another model pass its --config.rho. The author says there that the files were trained
on 64 TPU chips, each of which moved the weights by the gradient of its own images, and that fewer of them want a larger rho. Here
the gradient of the whole batch moves them all. How test images are prepared differs as in pretrain.py.
"""

from keras_vit.configs import gsam


def get_config(model=""):
    config = gsam.get_config(model or "b16")
    with config.unlocked():
        config.loss, config.head_bias = "softmax", 0.0
        config.two_pass, config.rho = "sam", 0.2
    return config.lock()
