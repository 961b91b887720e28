"""What the published files hold, written out by hand from their repositories: the other side of the maps in keras_vit/models.

Each entry of FILES is (path below gs:// without .npz, or a whole URL, model, side of its images, classes or None, width of
`pre_logits` or None, MiB or None).
Paths and sizes: listings in google-research/vision_transformer (vit_jax.ipynb, README.md) and google-research/big_vision; of
Compact Transformers in README.md and examples/README.md of SHI-Labs/Compact-Transformers; of facebookresearch/deit in its
README_*.md and models; of PoolFormers in README.md and models/metaformer.py of sail-sg/poolformer.
"""

import numpy as np

from keras_vit.checkpoints import files


class Shapes(files.Npz):
    """An archive that has names and shapes but no numbers."""

    def __init__(self, path, shapes):
        self.path, self.sha256, self.metadata = path, "0" * 64, {}
        self.entries = {name: (shape, np.dtype("<f4")) for name, shape in shapes.items()}

    def scan(self, name):
        return 0, 1.0


# width, depth, heads, hidden width of the MLP
SIZES = {
    "Ti": (192, 12, 3, 768), "S": (384, 12, 6, 1536), "B": (768, 12, 12, 3072), "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120), "M": (512, 12, 8, 2048), "So400m": (1152, 27, 16, 4304), "g-opt": (1536, 40, 16, 6144),
}  # fmt: skip
# blocks in each stage, channels
POOLFORMERS = {
    "S12": ((2, 2, 6, 2), (64, 128, 320, 512)), "S24": ((4, 4, 12, 4), (64, 128, 320, 512)),
    "S36": ((6, 6, 18, 6), (64, 128, 320, 512)), "M36": ((6, 6, 18, 6), (96, 192, 384, 768)),
    "M48": ((8, 8, 24, 8), (96, 192, 384, 768)),
}  # fmt: skip
# units in each stage
STEMS = {"R": (), "R26": (2, 2, 2, 2), "R50B": (3, 4, 9), "R50": (3, 4, 6, 3)}
# width, depth, hidden width of token mixing and channel mixing
MIXERS = {"S": (512, 8, 256, 2048), "B": (768, 12, 384, 3072), "L": (1024, 24, 512, 4096)}

# width, depth, hidden width of the MLP
COMPACT = {2: (128, 2, 128), 4: (128, 4, 128), 6: (256, 6, 512), 7: (256, 7, 512), 14: (384, 14, 1152)}

_21K, _DEIT = 21_843, "https://dl.fbaipublicfiles.com/deit"
_AUGREG = [  # model, file, MiB, fine-tuned at 384, fine-tuned at 224
    ("L/16", "L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0", 1243, "lr_0.01"),
    ("B/16", "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0", 391, "lr_0.03"),
    ("S/16", "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0", 115, "lr_0.03"),
    ("R50+L/32", "R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1", 1337, "lr_0.01"),
    ("R26+S/32", "R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0", 170, "lr_0.01"),
    ("Ti/16", "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0", 37, "lr_0.03"),
    ("B/32", "B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0", 398, "lr_0.01"),
    ("S/32", "S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0", 118, "lr_0.01"),
    ("R+Ti/16", "R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0", 40, "lr_0.03"),
    ("B/8", "B_8-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0", None, None),
]  # fmt: skip
_AUGREG_224 = [
    ("B/8", "B_8-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224"),
    ("L/16", "L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_224"),
    ("B/16", "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_224"),
    ("S/16", "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224"),
    ("Ti/16", "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224"),
    ("B/32", "B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224"),
    ("S/32", "S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224"),
    ("S/32", "S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_224"),
    ("R50+L/32", "R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_224"),
    ("R26+S/32", "R26_S_32-i21k-300ep-lr_0.001-aug_light0-wd_0.03-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.03-res_224"),
    ("R+Ti/16", "R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224"),
]

FILES = [
    *[(f"vit_models/imagenet21k/{file}", model, 224, _21K, rep, mib) for file, model, rep, mib in [
        ("ViT-B_8", "B/8", 768, 393.72), ("ViT-B_16", "B/16", 768, 393.69), ("ViT-B_32", "B/32", 768, 400.01),
        ("ViT-L_16", "L/16", 1024, 1.22 * 1024), ("ViT-L_32", "L/32", 1024, 1.23 * 1024), ("ViT-H_14", "H/14", 1280, 2.46 * 1024),
        ("R26+ViT-B_32", "R26+B/32", 768, 450.23), ("R50+ViT-B_16", "R50B+B/16", 768, 439.85),
        ("R50+ViT-L_32", "R50+L/32", 1024, 1.31 * 1024),
    ]],
    *[(f"vit_models/imagenet21k+imagenet2012/{file}", model, side, 1000, None, mib) for file, model, side, mib in [
        ("ViT-B_8", "B/8", 384, 334.78), ("ViT-B_16", "B/16", 384, 331.4), ("ViT-B_16-224", "B/16", 224, 330.29),
        ("ViT-B_32", "B/32", 384, 336.89), ("ViT-L_16", "L/16", 384, 1.14 * 1024), ("ViT-L_16-224", "L/16", 224, 1.13 * 1024),
        ("ViT-L_32", "L/32", 384, 1.14 * 1024), ("R50+ViT-B_16", "R50B+B/16", 384, 377.57),
    ]],
    *[(f"vit_models/sam/ViT-{file}", model, 224, 1000, None, mib) for file, model, mib in [
        ("S_16", "S/16", None), ("B_16", "B/16", 330.3), ("B_32", "B/32", 336.61), ("L_16", "L/16", 1.13 * 1024),
        ("L_32", "L/32", 1.14 * 1024),
    ]],
    ("vit_models/gsam/ViT-B_16", "B/16", 224, 1000, None, None),
    *[(f"vit_models/augreg/{file}", model, 224, _21K, None, mib) for model, file, mib, _ in _AUGREG],
    *[(f"vit_models/augreg/{file}--imagenet2012-steps_20k-{lr}-res_384", model, 384, 1000, None, None)
      for model, file, _, lr in _AUGREG if lr],
    *[(f"vit_models/augreg/{file}", model, 224, 1000, None, None) for model, file in _AUGREG_224],
    *[(f"mixer_models/{folder}/Mixer-{file}", f"Mixer {file.replace('_', '/')}", 224, classes, None, mib)
      for folder, classes, files in [
        ("imagenet1k", 1000, {"B_16": 228.47, "L_16": 794.29}), ("imagenet21k", _21K, {"B_16": 289.61, "L_16": 875.78}),
        ("sam", 1000, {"B_16": 228.47, "B_32": 230.04}),
        ("gsam", 1000, {"B_16": 228.47, "B_32": 230.04, "S_16": 70.71, "S_32": 72.91, "S_8": 78.79}),
      ] for file, mib in files.items()],
    *[(f"big_vision/flexivit/flexivit_{size.lower()}_i1k{epochs}", f"Flexi {size}", 240, 1000, None, None)
      for size in "SBL" for epochs in ("", "_90ep", "_300ep", "_600ep")],
    *[(f"big_vision/flexivit/{file}", "Flexi B", 240, _21K, None, None) for file in [
        "flexivit_b_i21k_90ep", "flexivit_b_i21k_300ep", "flexivit_b_i21k_1000ep", "vit_b16_i21k_300ep", "vit_b30_i21k_300ep",
    ]],
    *[(f"big_vision/vit_s16_i1k_{epochs}ep", "bv gap sincos2d S/16", 224, 1000, 384, None) for epochs in (90, 150, 300)],
    *[(f"big_vision/zoo/deit3/bv_deit_3_{name}_{side}_{data}", f"bv tok {size}/16", side, 1000, None, None)
      for name, size in {"small": "S", "base": "B", "large": "L"}.items() for side in (224, 384) for data in ("1k", "21k")],
    *[(f"big_vision/siglip/webli_{file}", f"bv map {model}", side, None, None, None) for file, model, side in [
        ("en_b16_224_63724782", "B/16", 224), ("en_b16_256_60500360", "B/16", 256), ("en_b16_384_68578854", "B/16", 384),
        ("en_b16_512_68580893", "B/16", 512), ("en_l16_256_60552751", "L/16", 256), ("en_l16_384_63634585", "L/16", 384),
        ("en_so400m_224_57633886", "So400m/14", 224), ("en_so400m_384_58765454", "So400m/14", 384),
        ("i18n_b16_256_66117334", "B/16", 256),
    ]],
    *[(f"big_vision/siglip2/siglip2_{file}_{side}", f"bv map {model}", side, None, None, None) for file, model, sides in [
        ("b16", "B/16", (224, 256, 384, 512)), ("b32", "B/32", (256,)), ("l16", "L/16", (256, 384, 512)),
        ("so400m14", "So400m/14", (224, 384)), ("so400m16", "So400m/16", (256, 384, 512)), ("g-opt16", "g-opt/16", (256, 384)),
    ] for side in sides],
    *[(f"https://github.com/SHI-Labs/Compact-Transformers/files/{file}.pth.zip", model, 32, classes, None, None)
      for model, files in {
        "ViTLite 7/4": ("6666087/vitlite7-4_cifar10", "6666088/vitlite7-4_cifar100"),
        "ViTLite 6/4": ("6666085/vitlite6-4_cifar10", "6666086/vitlite6-4_cifar100"),
        "CVT 7/4": ("6666077/cvt7-4_cifar10", "6666078/cvt7-4_cifar100"),
        "CVT 6/4": ("6666075/cvt6-4_cifar10", "6666076/cvt6-4_cifar100"),
        "CCT 2/3x2": ("6666059/cct2-3x2_cifar10", "6666060/cct2-3x2_cifar100"),
        "CCT 4/3x2": ("6666061/cct4-3x2_cifar10", "6666066/cct4-3x2_cifar100"),
        "CCT 6/3x2": ("6658604/cct6-3x2_cifar10_best", "6658605/cct6-3x2_cifar100_best"),
        "CCT 7/3x2": ("6657152/cct7-3x2_cifar10_best", "6657154/cct7-3x2_cifar100_best"),
        "CCT 7/3x1": ("6644400/cct7-3x1_cifar10_best", "6657226/cct7-3x1_cifar100_best"),
        "CCT 6/3x1": ("6657185/cct6-3x1_cifar10_best", "6657221/cct6-3x1_cifar100_best"),
        "CCT 6/3x1 500": ("6730781/cct6-3x1_cifar10_500", "6730783/cct6-3x1_cifar100_500"),
      }.items() for file, classes in zip(files, (10, 100))],
    *[(f"https://shi-labs.com/projects/cct/checkpoints/{file}.pth", f"CCT {model}", side, classes, None, None)
      for file, model, side, classes in [
        *[(f"pretrained/cct_7_3x1_32_cifar{n}_300epochs", "7/3x1", 32, n) for n in (10, 100)],
        *[(f"pretrained/cct_7_3x1_32_sine_cifar{n}_{epochs}epochs", "7/3x1", 32, n) for n in (10, 100)
          for epochs in (1500, 5000)],
        ("pretrained/cct_7_7x2_224_flowers102", "7/7x2", 224, 102), ("pretrained/cct_14_7x2_224_imagenet", "14/7x2", 224, 1000),
        ("finetuned/cct_14_7x2_384_imagenet", "14/7x2", 384, 1000), ("finetuned/cct_14_7x2_384_flowers102", "14/7x2", 384, 102),
      ]],
    *[(f"{_DEIT}/deit_{file}.pth", f"DeiT {model}", side, 1000, None, None) for file, model, side in [
        ("tiny_patch16_224-a1311bcf", "Ti/16", 224), ("small_patch16_224-cd65a155", "S/16", 224),
        ("base_patch16_224-b5f2ef4d", "B/16", 224), ("base_patch16_384-8de9b5d1", "B/16", 384),
        ("tiny_distilled_patch16_224-b40b3cf7", "distilled Ti/16", 224),
        ("small_distilled_patch16_224-649709d9", "distilled S/16", 224),
        ("base_distilled_patch16_224-df68dfff", "distilled B/16", 224),
        ("base_distilled_patch16_384-d0272ac0", "distilled B/16", 384),
        *[(f"3_{name}_{side}_{data}", f"III {size}/16", side) for name, size, sides in [
            ("small", "S", (224, 384)), ("medium", "M", (224,)), ("base", "B", (224, 384)), ("large", "L", (224, 384)),
          ] for side in sides for data in ("1k", "21k")],
        ("3_huge_224_1k", "III H/14", 224), ("3_huge_224_21k_v1", "III H/14", 224),
    ]],
    *[(f"{_DEIT}/{file}_{kind}.pth", f"ResMLP {model}", 224, 1000, None, None) for file, model, kinds in [
        ("resmlp_12", "S/12", ("no_dist", "dist", "dino")), ("resmlp_24", "S/24", ("no_dist", "dist", "dino")),
        ("resmlp_36", "S/36", ("no_dist", "dist")), ("resmlpB_24", "B/24", ("no_dist", "dist", "22k")),
    ] for kind in kinds],
    *[(f"{_DEIT}/{model}_{side}.pth", f"CaiT {model}", side, 1000, None, None) for model, sides in {
        "XXS24": (224, 384), "XXS36": (224, 384), "XS24": (384,), "S24": (224, 384), "S36": (384,), "M36": (384,), "M48": (448,),
    }.items() for side in sides],
    *[(f"https://github.com/sail-sg/poolformer/releases/download/v1.0/{file}.pth.tar", model, 224, 1000, None, None)
      for file, model in {
        **{f"poolformer_{size.lower()}": f"PoolFormer {size}" for size in POOLFORMERS}, "metaformer_id_s12": "PoolFormer S12",
        **{f"metaformer_{mixers}_s12_224": f"PoolFormer S12 {mixers}" for mixers in ("pppa", "ppaa", "pppf", "ppff")},
      }.items()],
]  # fmt: skip


def _dense(name, *shape, bias=True):
    return {f"{name}/kernel": shape, **({f"{name}/bias": shape[-1:]} if bias else {})}


def _norm(name, width, wrapped=False):
    return {f"{name}/{leaf}": (1, 1, 1, width) if wrapped else (width,) for leaf in ("scale", "bias")}


def _attention(name, width, heads):
    size = width // heads
    found = {f"{name}/out/kernel": (heads, size, width), f"{name}/out/bias": (width,)}
    for part in ("query", "key", "value"):
        found |= {f"{name}/{part}/kernel": (width, heads, size), f"{name}/{part}/bias": (heads, size)}
    return found


def _mlp(name, width, hidden):
    return _dense(f"{name}/Dense_0", width, hidden) | _dense(f"{name}/Dense_1", hidden, width)


def _encoder(size, names):
    width, depth, heads, hidden = SIZES[size]
    found = _norm("Transformer/encoder_norm", width)
    for block in (f"Transformer/encoderblock_{i}" for i in range(depth)):
        norm_1, attention, norm_2, mlp = (f"{block}/{name}" for name in names)
        found |= _norm(norm_1, width) | _attention(attention, width, heads) | _norm(norm_2, width) | _mlp(mlp, width, hidden)
    return found


PRE_LINEN = ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
LINEN = ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")


def _top(width, classes, rep):
    found = _dense("pre_logits", width, rep) if rep else {}
    return found | (_dense("head", rep or width, classes) if classes else {})


def _stem(units):
    """A ResNet of bottlenecks whose group norms are kept as (1, 1, 1, c), and its output's channels."""
    found = _dense("conv_root", 7, 7, 3, 64, bias=False) | _norm("gn_root", 64, wrapped=True)
    channels = 64
    for stage, count in enumerate(units):
        inner = 64 * 2**stage
        for unit in range(count):
            name = f"block{stage + 1}/unit{unit + 1}"
            shapes = {"1": (1, 1, channels, inner), "2": (3, 3, inner, inner), "3": (1, 1, inner, 4 * inner)}
            if unit == 0:
                shapes["_proj"] = (1, 1, channels, 4 * inner)
            for part, shape in shapes.items():
                found |= _dense(f"{name}/conv{part}", *shape, bias=False) | _norm(f"{name}/gn{part}", shape[-1], wrapped=True)
            channels = 4 * inner
    return found, channels


def _mixer(model, side, classes):
    size, patch = model.split("/")[0], int(model.split("/")[1])
    width, depth, tokens, channels = MIXERS[size]
    found = _dense("stem", patch, patch, 3, width) | _norm("pre_head_layer_norm", width) | _top(width, classes, None)
    for block in (f"MixerBlock_{i}" for i in range(depth)):
        found |= _norm(f"{block}/LayerNorm_0", width) | _norm(f"{block}/LayerNorm_1", width)
        found |= _mlp(f"{block}/token_mixing", (side // patch) ** 2, tokens) | _mlp(f"{block}/channel_mixing", width, channels)
    return found


def _linear(name, inputs, outputs, bias=True):
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def _torch_norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _compact(kind, size, side, classes):
    """Of CCT, CVT or ViTLite; size is "layers/patch" or "layers/kernel x convolutions"."""
    layers, tokenizer = size.split(" ")[0].split("/")
    width, depth, hidden = COMPACT[int(layers)]
    kernel, *convolutions = map(int, tokenizer.split("x"))
    channels = [3, *[64] * (convolutions[0] - 1 if convolutions else 0), width]
    found = {}
    for i, (inputs, outputs) in enumerate(zip(channels, channels[1:])):
        found[f"tokenizer.conv_layers.{i}.0.weight"] = (outputs, inputs, kernel, kernel)
        side //= {3: 2, 7: 4}[kernel] if kind == "CCT" else kernel
    if kind != "CCT":
        found["tokenizer.conv_layers.0.0.bias"] = (width,)
    if kind == "ViTLite":
        found["classifier.class_emb"] = (1, 1, width)
    else:
        found |= _linear("classifier.attention_pool", width, 1)
    found["classifier.positional_emb"] = (1, side**2 + (kind == "ViTLite"), width)
    for block in (f"classifier.blocks.{i}" for i in range(depth)):
        found |= _torch_norm(f"{block}.pre_norm", width) | _torch_norm(f"{block}.norm1", width)
        found |= _linear(f"{block}.self_attn.qkv", width, 3 * width, bias=False) | _linear(
            f"{block}.self_attn.proj", width, width
        )
        found |= _linear(f"{block}.linear1", width, hidden) | _linear(f"{block}.linear2", hidden, width)
    return found | _torch_norm("classifier.norm", width) | _linear("classifier.fc", width, classes)


def _torch_block(name, width, hidden):
    found = _torch_norm(f"{name}.norm1", width) | _torch_norm(f"{name}.norm2", width)
    found |= _linear(f"{name}.attn.qkv", width, 3 * width) | _linear(f"{name}.attn.proj", width, width)
    return found | _linear(f"{name}.mlp.fc1", width, hidden) | _linear(f"{name}.mlp.fc2", hidden, width)


def _deit(kind, name, side, classes):
    size, patch = name.split("/")[0], int(name.split("/")[1])
    width, depth, _, hidden = SIZES[size]
    found = {"cls_token": (1, 1, width), "patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    rows = {"plain": 1, "distilled": 2, "III": 0}[kind]
    found["pos_embed"] = (1, (side // patch) ** 2 + rows, width)
    for block in (f"blocks.{i}" for i in range(depth)):
        found |= _torch_block(block, width, hidden)
        if kind == "III":
            found |= {f"{block}.gamma_{branch}": (width,) for branch in (1, 2)}
    found |= _torch_norm("norm", width) | _linear("head", width, classes)
    if kind == "distilled":
        found |= {"dist_token": (1, 1, width), **_linear("head_dist", width, classes)}
    return {f"model/{name}": shape for name, shape in found.items()}


def _resmlp(size, depth, side, classes):
    width, patch = {"S": (384, 16), "B": (768, 8)}[size]
    tokens, found = (side // patch) ** 2, {}
    found = {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    for block in (f"blocks.{i}" for i in range(int(depth))):
        found |= {f"{block}.{name}": (width,) for name in ("gamma_1", "gamma_2")}
        found |= {f"{block}.{name}": (width,) for name in ("norm1.alpha", "norm1.beta", "norm2.alpha", "norm2.beta")}
        found |= _linear(f"{block}.attn", tokens, tokens)
        found |= _linear(f"{block}.mlp.fc1", width, 4 * width) | _linear(f"{block}.mlp.fc2", 4 * width, width)
    return found | {"norm.alpha": (width,), "norm.beta": (width,), **_linear("head", width, classes)}


def _cait(size, side, classes):
    width, heads = {"XXS": (192, 4), "XS": (288, 6), "S": (384, 8), "M": (768, 16)}[size[:-2]]
    found = {"cls_token": (1, 1, width), "patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    found["pos_embed"] = (1, (side // 16) ** 2, width)
    for block in (f"blocks.{i}" for i in range(int(size[-2:]))):
        found |= _torch_block(block, width, 4 * width) | {f"{block}.gamma_{branch}": (width,) for branch in (1, 2)}
        found |= _linear(f"{block}.attn.proj_l", heads, heads) | _linear(f"{block}.attn.proj_w", heads, heads)
    for block in (f"blocks_token_only.{i}" for i in range(2)):
        whole = _torch_block(block, width, 4 * width) | {f"{block}.gamma_{branch}": (width,) for branch in (1, 2)}
        found |= {name: shape for name, shape in whole.items() if ".qkv." not in name}
        for name in "qkv":
            found |= _linear(f"{block}.attn.{name}", width, width)
    found |= _torch_norm("norm", width) | _linear("head", width, classes)
    return {f"model/module.{name}": shape for name, shape in found.items()}


def _poolformer(size, classes, mixers="pppp"):
    """Of a letter for each stage's mixer: pooling, attention or fully connected; attention has positions where it begins."""
    depths, widths = POOLFORMERS[size]
    found = {"patch_embed.proj.weight": (widths[0], 3, 7, 7), "patch_embed.proj.bias": widths[:1]}
    at = 0
    for stage, (depth, width, mixer) in enumerate(zip(depths, widths, mixers)):
        if stage:
            found |= {f"network.{at}.proj.weight": (width, widths[stage - 1], 3, 3), f"network.{at}.proj.bias": (width,)}
            at += 1
        side = 56 // 2**stage
        if mixer == "a" and mixers.index("a") == stage:
            found[f"network.{at}.pos_embed"] = (1, width, side, side)
            at += 1
        for block in (f"network.{at}.{i}" for i in range(depth)):
            vectors = ["layer_scale_1", "layer_scale_2", *(f"norm{n}.{leaf}" for n in (1, 2) for leaf in ("weight", "bias"))]
            found |= {f"{block}.{name}": (width,) for name in [*vectors, "mlp.fc2.bias"]}
            found |= {f"{block}.mlp.fc1.weight": (4 * width, width, 1, 1), f"{block}.mlp.fc1.bias": (4 * width,)}
            found[f"{block}.mlp.fc2.weight"] = (width, 4 * width, 1, 1)
            if mixer == "a":
                found |= {f"{block}.token_mixer.qkv.weight": (3 * width, width)}
                found |= {f"{block}.token_mixer.proj.weight": (width, width), f"{block}.token_mixer.proj.bias": (width,)}
            if mixer == "f":
                found[f"{block}.token_mixer.fc.weight"] = (side**2, side**2)
        at += 1
    found |= {"norm.weight": (width,), "norm.bias": (width,)}
    return found | {"head.weight": (classes, width), "head.bias": (classes,)}


def arrays(model, side, classes, rep):
    """{name: shape} of all arrays of a published file."""
    if model.startswith(("CCT ", "CVT ", "ViTLite ")):
        return _compact(*model.split(" ", 1), side, classes)
    if model.startswith("CaiT "):
        return _cait(model.removeprefix("CaiT "), side, classes)
    if model.startswith("ResMLP "):
        return _resmlp(*model.removeprefix("ResMLP ").split("/"), side, classes)
    if model.startswith("DeiT "):
        *kind, name = model.removeprefix("DeiT ").split(" ")
        return _deit(kind[0] if kind else "plain", name, side, classes)
    if model.startswith("PoolFormer "):
        size, *mixers = model.split(" ")[1:]
        return _poolformer(size, classes, *mixers)
    if model.startswith("Mixer "):
        return _mixer(model.removeprefix("Mixer "), side, classes)
    *kind, name = model.split(" ")
    if kind[:1] in (["bv"], ["Flexi"]):
        flexi = kind == ["Flexi"]
        size, patch = (name, 32) if flexi else (name.split("/")[0], int(name.split("/")[1]))
        width, _, heads, hidden = SIZES[size]
        found = _dense("embedding", patch, patch, 3, width) | _encoder(size, LINEN) | _top(width, classes, rep)
        if "sincos2d" not in kind:
            found["pos_embedding"] = (1, 49 if flexi else (side // patch) ** 2, width)
        if flexi or "tok" in kind:
            found["cls"] = (1, 1, width)
        if "map" in kind:
            found |= {"MAPHead_0/probe": (1, 1, width), **_attention("MAPHead_0/MultiHeadDotProductAttention_0", width, heads)}
            found |= _norm("MAPHead_0/LayerNorm_0", width) | _mlp("MAPHead_0/MlpBlock_0", width, hidden)
            return {f"params/img/{name}": shape for name, shape in found.items()} | {"params/t": (1,), "params/b": (1,)}
        return {f"params/{name}": shape for name, shape in found.items()}
    stem, _, vit = name.rpartition("+")
    size, patch = vit.split("/")[0], int(vit.split("/")[1])
    width, grid = SIZES[size][0], side // (32 if stem == "R" else patch)  # the root of R+Ti/16 shrinks by 4, its patches by 8
    found = _encoder(size, PRE_LINEN) | _top(width, classes, rep) | {"cls": (1, 1, width)}
    found["Transformer/posembed_input/pos_embedding"] = (1, 1 + grid**2, width)
    if stem:
        body, channels = _stem(STEMS[stem])
        kernel = 1 if STEMS[stem] else 8
        return found | body | _dense("embedding", kernel, kernel, channels, width)
    return found | _dense("embedding", patch, patch, 3, width)
