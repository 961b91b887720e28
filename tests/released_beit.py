"""What the published files of BEiT hold, written out by hand: the other side of the maps in keras_vit/models/beit.py.

Each entry of FILES is (source, size, kind, whose spelling, side of its images, classes, MB as huggingface.co lists it or None).
Sources: README.md of microsoft/unilm/beit, listings of huggingface.co. Names: `modeling_finetune.py`, `modeling_pretrain.py` and
`semantic_segmentation` of unilm, and `convert_beit_unilm_to_pytorch.py` of transformers.
"""

SIZES = {"base": (768, 12, 12), "large": (1024, 24, 16)}  # width, depth, heads
_SIDES = {"base": (224, 384), "large": (224, 384, 512)}
_MB = {
    "microsoft/beit-base-patch16-224-pt22k": 368, "microsoft/beit-base-patch16-224-pt22k-ft22k": 414,
    "timm/beit_base_patch16_224.in22k_ft_in22k": 414, "timm/beit_base_patch16_224.in22k_ft_in22k_in1k": 350,
    "microsoft/beit-large-patch16-224-pt22k-ft22k": 1310, "microsoft/beit-large-patch16-224": 1230,
    "microsoft/beit-large-patch16-384": 1280, "microsoft/beit-large-patch16-512": 1420,
    "microsoft/beit-base-finetuned-ade-640-640": 900, "microsoft/beit-large-finetuned-ade-640-640": 2260,
}  # fmt: skip
_RELEASES = "https://github.com/addf400/files/releases/download/v1.0"


def _files():
    for size in SIZES:
        original, microsoft = f"{_RELEASES}/beit_{size}_patch16", f"hf://microsoft/beit-{size}"
        found = [
            (f"{original}_224_pt22k.pth", "masked", "unilm", 224, 8192),
            (f"{microsoft}-patch16-224-pt22k/pytorch_model.bin", "masked", "hugging face", 224, 8192),
            (f"{original}_224_pt22k_ft22k.pth", "classifier", "unilm", 224, 21_841),
            (f"{original}_224_pt22k_ft1k.pth", "classifier", "unilm", 224, 1000),
            (f"{microsoft}-patch16-224-pt22k-ft22k/pytorch_model.bin", "classifier", "hugging face", 224, 21_841),
            (f"hf://timm/beit_{size}_patch16_224.in22k_ft_in22k/model.safetensors", "classifier", "timm", 224, 21_841),
            (f"{original}_640_pt22k_ft22ktoade20k.pth", "segmenter", "unilm", 640, 150),
            (f"{microsoft}-finetuned-ade-640-640/pytorch_model.bin", "segmenter", "hugging face", 640, 150),
        ]
        for side in _SIDES[size]:
            timm = f"hf://timm/beit_{size}_patch16_{side}.in22k_ft_in22k_in1k/model.safetensors"
            found += [
                (f"{original}_{side}_pt22k_ft22kto1k.pth", "classifier", "unilm", side, 1000),
                (f"{microsoft}-patch16-{side}/pytorch_model.bin", "classifier", "hugging face", side, 1000),
                (timm, "classifier", "timm", side, 1000),
            ]
        for source, *facts in found:
            yield source, size, *facts, _MB.get("/".join(source.removeprefix("hf://").split("/")[:2]))


FILES = list(_files())


class _Arrays(dict):
    """{name: (shape, dtype)}, filled layer by layer."""

    def put(self, name, *shape, dtype="<f4"):
        self[name] = (shape, dtype)

    def linear(self, name, inputs, outputs, *window, bias=True):
        self.put(f"{name}.weight", outputs, inputs, *window)
        if bias:
            self.put(f"{name}.bias", outputs)

    def norm(self, name, width):
        self.put(f"{name}.weight", width)
        self.put(f"{name}.bias", width)

    def batch_norm(self, name, width):
        self.norm(name, width)
        self.put(f"{name}.running_mean", width)
        self.put(f"{name}.running_var", width)
        self.put(f"{name}.num_batches_tracked", dtype="<i8")

    def unit(self, name, inputs, outputs, side):
        self.linear(f"{name}.conv", inputs, outputs, side, side, bias=False)
        self.batch_norm(f"{name}.bn", outputs)

    def positions(self, name, grid, heads):
        self.put(f"{name}relative_position_bias_table", (2 * grid - 1) ** 2 + 3, heads)
        self.put(f"{name}relative_position_index", grid**2 + 1, grid**2 + 1, dtype="<i8")


def arrays(size, kind, style, side, classes):
    """{name: (shape, dtype)} of all arrays of a published file."""
    (width, depth, heads), grid, a = SIZES[size], side // 16, _Arrays()
    if style == "hugging face":
        a.put("beit.embeddings.cls_token", 1, 1, width)
        a.linear("beit.embeddings.patch_embeddings.projection", 3, width, 16, 16)
        for layer in (f"beit.encoder.layer.{i}" for i in range(depth)):
            for part in ("query", "key", "value"):
                a.linear(f"{layer}.attention.attention.{part}", width, width, bias=part != "key")
            if kind != "masked":
                a.positions(f"{layer}.attention.attention.relative_position_bias.", grid, heads)
            a.linear(f"{layer}.attention.output.dense", width, width)
            a.linear(f"{layer}.intermediate.dense", width, 4 * width)
            a.linear(f"{layer}.output.dense", 4 * width, width)
            for name in ("lambda_1", "lambda_2"):
                a.put(f"{layer}.{name}", width)
            for name in ("layernorm_before", "layernorm_after"):
                a.norm(f"{layer}.{name}", width)
        if kind == "masked":
            a.put("beit.embeddings.mask_token", 1, 1, width)
            a.positions("beit.encoder.relative_position_bias.", grid, heads)
            a.norm("layernorm", width)
            a.linear("lm_head", width, classes)
        elif kind == "classifier":
            a.norm("beit.pooler.layernorm", width)
            a.linear("classifier", width, classes)
        else:
            _segmenter(a, "", "classifier", width, classes)
        return dict(a)
    encoder = "backbone." if kind == "segmenter" else ""
    a.put(f"{encoder}cls_token", 1, 1, width)
    a.linear(f"{encoder}patch_embed.proj", 3, width, 16, 16)
    for block in (f"{encoder}blocks.{i}" for i in range(depth)):
        for name in ("gamma_1", "gamma_2", "attn.q_bias", "attn.v_bias"):
            a.put(f"{block}.{name}", width)
        if kind != "masked":
            a.positions(f"{block}.attn.", grid, heads)
        for name in ("norm1", "norm2"):
            a.norm(f"{block}.{name}", width)
        a.linear(f"{block}.attn.qkv", width, 3 * width, bias=False)
        a.linear(f"{block}.attn.proj", width, width)
        a.linear(f"{block}.mlp.fc1", width, 4 * width)
        a.linear(f"{block}.mlp.fc2", 4 * width, width)
    if kind == "masked":
        a.put("mask_token", 1, 1, width)
        a.positions("rel_pos_bias.", grid, heads)
        a.norm("norm", width)
        a.linear("lm_head", width, classes)
    elif kind == "classifier":
        a.norm("fc_norm", width)
        a.linear("head", width, classes)
    else:
        _segmenter(a, encoder, "conv_seg", width, classes)
    root = {"timm": "", "unilm": "state_dict/" if kind == "segmenter" else "model/"}[style]
    return {root + name: entry for name, entry in a.items()}


def _segmenter(a, pyramid, classifier, width, classes):
    for name in ("fpn1.0", "fpn1.3", "fpn2.0"):
        a.linear(f"{pyramid}{name}", width, width, 2, 2)
    a.batch_norm(f"{pyramid}fpn1.1", width)
    for i in range(4):
        a.unit(f"decode_head.psp_modules.{i}.1", width, width, 1)
    for i in range(3):
        a.unit(f"decode_head.lateral_convs.{i}", width, width, 1)
        a.unit(f"decode_head.fpn_convs.{i}", width, width, 3)
    a.unit("decode_head.bottleneck", 5 * width, width, 3)
    a.unit("decode_head.fpn_bottleneck", 4 * width, width, 3)
    a.linear(f"decode_head.{classifier}", width, classes, 1, 1)
    a.unit("auxiliary_head.convs.0", width, 256, 3)
    a.linear(f"auxiliary_head.{classifier}", 256, classes, 1, 1)
