"""Small timm ViTs with random weights, each with another part of timm, and files of them."""

import timm
import torch
from safetensors.torch import save_file
from timm.layers import Attention, RmsNorm, SwiGLU
from timm.models import register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelThingsBlock, ResPostBlock, VisionTransformer

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}

# Options of small VisionTransformers, each with another part of timm.
OPTIONS = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "layer_scale": {"init_values": 1e-5},
    "registers": {"reg_tokens": 4},
    "avg": {"global_pool": "avg"},
    "avg_without_fc_norm": {"global_pool": "avg", "fc_norm": False},
    "avg_over_prefix": {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 2},
    "avgmax": {"global_pool": "avgmax"},
    "map": {"global_pool": "map", "reg_tokens": 1},
    "prr": {"global_pool": "prr"},
    "no_pooling": {"global_pool": "", "reg_tokens": 2},
    "no_class_token": {"class_token": False, "global_pool": "avg"},
    "registers_without_class_token": {"class_token": False, "global_pool": "avg", "reg_tokens": 3},
    "token_with_fc_norm": {"fc_norm": True},
    "pre_norm": {"pre_norm": True},
    "no_embed_class": {"no_embed_class": True, "reg_tokens": 2},
    "no_positions": {"pos_embed": "none"},
    "scale_norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no_biases": {"qkv_bias": False, "proj_bias": False},
    "swiglu_rms": {"mlp_layer": SwiGLU, "norm_layer": RmsNorm},
    "post_norm_blocks": {"block_fn": ResPostBlock, "init_values": 1e-5},
    "parallel_things_blocks": {"block_fn": ParallelThingsBlock},
    "dynamic_size": {"dynamic_img_size": True},
    "tall": {"img_size": (48, 32), "reg_tokens": 1},
}
NAMED = {
    "deit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_tiny_patch16_224": {"qk_norm": True},
    "vit_small_patch14_dinov2": {},
    "vit_small_patch14_reg4_dinov2": {},
    "vit_base_patch16_clip_224": {},
    "vit_base_patch16_siglip_224": {},
}

# Together, these have every option of timm's Eva that its own names use.
EVAS = {
    "eva_giant_patch14_224": {},
    "eva02_tiny_patch14_224": {},
    "eva02_base_patch14_224": {},
    "eva02_enormous_patch14_clip_224": {},
    "vit_small_patch16_dinov3": {},
    "vit_huge_plus_patch16_dinov3": {},
    "vit_pe_core_tiny_patch16_384": {"attn_pool_num_heads": 2},
    "vit_pe_lang_large_patch14_448": {},
    "vit_pe_spatial_tiny_patch16_512": {},
    "vit_small_patch16_rope_ape_224": {},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_base_patch16_rope_reg1_gap_256": {},
    "vit_base_patch16_sapiens2": {"num_heads": 4, "num_kv_heads": (2, 4)},
}


def build(name: str) -> VisionTransformer | Eva:
    """Returns the variant in evaluation mode, with random weights, since initial norms and biases hide errors."""
    torch.manual_seed(0)
    if name in NAMED or name in EVAS:
        options = NAMED.get(name) or EVAS.get(name) or {}
        vit = timm.create_model(name, pretrained=False, **{**SMALL, **options})
    elif name == "gated_odd_heads":
        vit = VisionTransformer(**SMALL)
        for block in vit.blocks:
            block.attn = Attention(32, num_heads=3, attn_head_dim=12, qkv_bias=True, gated=True)
    else:
        vit = VisionTransformer(**{**SMALL, **OPTIONS[name]})
    return randomise(vit)


def randomise(vit):
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return vit.eval()


def images_for(name: str) -> torch.Tensor:
    return torch.randn(2, 3, {"dynamic_size": 40, "tall": 48}.get(name, 32), 32)


# Small networks with names in timm, from which load_timm gets only the name and the file.
REGISTERED = {
    "small_vit_plain": {},
    "small_vit_qk_norm": {"qk_norm": True},
    "small_vit_registers": {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5},
    "small_vit_registers_in_table": {"reg_tokens": 4},
    "small_vit_average": {"class_token": False, "global_pool": "avg"},
    "small_vit_latent_pool": {"class_token": False, "global_pool": "map"},
    "small_vit_layer_scale": {"init_values": 1e-5},
    "small_vit_no_table": {"pos_embed": "none"},
}
REGISTERED_EVAS = {
    "small_eva02": {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "use_rot_pos_emb": True},
    "small_dinov3": {
        "num_reg_tokens": 4,
        "init_values": 1e-5,
        "use_abs_pos_emb": False,
        "use_rot_pos_emb": True,
        "rope_type": "dinov3",
        "rope_rotate_half": True,
        "no_embed_class": True,
        "dynamic_img_size": True,
    },
}


def _register(name, options, kind):
    def make(pretrained=False, **given):
        given = {key: value for key, value in given.items() if key in ("img_size", "num_classes", "in_chans")}
        vit = kind(**{**SMALL, "img_size": 64, **options, **given})
        vit.pretrained_cfg = {"architecture": name}  # as in timm's networks
        return vit

    make.__name__, make.__module__ = name, kind.__module__
    register_model(make)


for each, given in REGISTERED.items():
    _register(each, given, VisionTransformer)
for each, given in REGISTERED_EVAS.items():
    _register(each, given, Eva)


def saved(folder, name, suffix=".safetensors", key=None, **options):
    """Returns a small network with random weights, and its file."""
    torch.manual_seed(0)
    vit = randomise(timm.create_model(name, **{"num_classes": 5, "img_size": 32, **options}))
    path = folder / f"weights{suffix}"
    state = vit.state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save({key: state} if key else state, path)
    return vit, path
