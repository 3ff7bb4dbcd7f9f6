"""Loads vision transformers of Hugging Face's transformers from their folders, as networks of timm.

A folder has ``config.json``, ``preprocessor_config.json`` and the weights, as ``save_pretrained`` writes them. The
weights are renamed into timm's classes, which compute the same. No code of a folder is run, and transformers is not
needed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from annotated_types import Interval
from timm.layers import GELUTanh, QuickGELU, SwiGLUPacked, resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from illama.checkpoints.huggingface_processor import find_processor, read_preprocessing
from illama.checkpoints.load import POSITIONS, check_finite, check_state
from illama.checkpoints.tensor_files import read_folder
from illama.checkpoints.timm_checkpoint import TimmCheckpoint, keep_features
from illama.errors import UserError
from illama.models.config import MOST_PATCHES, Blocks, Size
from illama.models.timm_vit import to_quantizable
from illama.options import Head, Positive
from illama.structured_files import parse_json, read_json

# Of tensors that are missing or of other shapes, and of numbers that no network has.
_MISFITS = (LookupError, RuntimeError, TypeError, ValueError, ArithmeticError)
CONFIG = "config.json"
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_new": GELUTanh,
    "gelu_pytorch_tanh": GELUTanh,
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
}


@dataclass(frozen=True)
class _Config:
    """The part of config.json that is used."""

    model_type: str
    vision_config: dict[str, Any] | None = None
    id2label: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Vision:
    """A vision transformer's settings; the defaults are those that most kinds share, which files leave out."""

    hidden_size: Size = 768
    num_hidden_layers: Blocks = 12
    num_attention_heads: Blocks = 12
    intermediate_size: Size = 3072
    mlp_ratio: Positive | None = None
    hidden_act: str = "gelu"
    layer_norm_eps: Positive = 1e-6
    patch_size: Size = 16
    num_channels: Size = 3
    num_register_tokens: Annotated[int, Interval(ge=0, le=1024)] = 0
    use_swiglu_ffn: bool = False
    use_gated_mlp: bool = False
    qkv_bias: bool = True
    query_bias: bool = True
    rope_theta: Positive = 100.0
    vision_use_head: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """Options of timm's networks."""
        if self.hidden_size % self.num_attention_heads:
            raise UserError(f"its width {self.hidden_size} has no {self.num_attention_heads} heads: correct the config")
        if self.hidden_act not in _ACTIVATIONS:
            raise UserError(f"its activation {self.hidden_act!r} is not supported: only {', '.join(_ACTIVATIONS)}")
        return {
            "patch_size": self.patch_size,
            "in_chans": self.num_channels,
            "embed_dim": self.hidden_size,
            "depth": self.num_hidden_layers,
            "num_heads": self.num_attention_heads,
            "mlp_ratio": self.mlp_ratio or self.intermediate_size / self.hidden_size,
            "norm_layer": partial(nn.LayerNorm, eps=self.layer_norm_eps),
            "act_layer": _ACTIVATIONS[self.hidden_act],
        }


_Make = Callable[["_Vision", "dict[str, Any]", "Mapping[str, Tensor]"], "VisionTransformer | Eva"]


@dataclass(frozen=True)
class _Kind:
    """How a kind of network is made of timm's.

    Attributes:
        make: returns timm's network for the settings, common options (image size, number of outputs), and the renamed
            state dict.
        heads: names of classifiers -> timm's.
        defaults: settings that files leave out.
        scale: what timm calls the first (1) and second (2) LayerScale of a block.
        antialias: whether transformers interpolates positions with antialiasing.
    """

    make: _Make
    heads: Mapping[str, str]
    defaults: Mapping[str, Any]
    scale: str = r".ls\1.gamma"
    antialias: bool = False


def _vit(vision: _Vision, common: dict[str, Any], state: Mapping[str, Tensor]) -> VisionTransformer:
    """ViT, and DeiT with a distillation token."""
    options = {**vision.options, **common, "qkv_bias": vision.qkv_bias}
    if "head_dist.weight" in state:
        return VisionTransformerDistilled(**options)
    return VisionTransformer(**options, reg_tokens=vision.num_register_tokens or int("reg_token" in state))


def _dinov2(vision: _Vision, common: dict[str, Any], state: Mapping[str, Tensor]) -> VisionTransformer:
    options = {**vision.options, **common, "qkv_bias": vision.qkv_bias, "init_values": 1e-5}
    if vision.use_swiglu_ffn:
        hidden = (int(vision.hidden_size * (vision.mlp_ratio or 4) * 2 / 3) + 7) // 8 * 8
        ratio = 2 * hidden / vision.hidden_size
        options |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": ratio}
    return VisionTransformer(**options, reg_tokens=vision.num_register_tokens, no_embed_class=True)


def _dinov3(vision: _Vision, common: dict[str, Any], state: Mapping[str, Tensor]) -> Eva:
    if not vision.use_gated_mlp and vision.hidden_act != "gelu":
        raise UserError(f"a DINOv3 with the activation {vision.hidden_act!r} is not supported")
    options = {name: value for name, value in vision.options.items() if name != "act_layer"}
    return Eva(
        **options,
        **common,
        global_pool="token",
        qkv_bias=vision.query_bias,
        swiglu_mlp=vision.use_gated_mlp,
        swiglu_align_to=int(vision.use_gated_mlp),  # with 0, timm joins the two matrices
        init_values=1e-5,
        num_reg_tokens=vision.num_register_tokens,
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        use_fc_norm=False,
        rope_type="dinov3",
        rope_temperature=vision.rope_theta,
        rope_rotate_half=True,
    )


def _siglip(vision: _Vision, common: dict[str, Any], state: Mapping[str, Tensor]) -> VisionTransformer:
    pool = "map" if vision.vision_use_head and not common["num_classes"] else "avg"
    options: dict[str, Any] = {**vision.options, **common, "class_token": False, "global_pool": pool, "fc_norm": False}
    return VisionTransformer(**options)


def _clip(vision: _Vision, common: dict[str, Any], state: Mapping[str, Tensor]) -> VisionTransformer:
    return VisionTransformer(**vision.options, **common, pre_norm=True)


# Names of all kinds, without the prefix of the patch convolution, and timm's.
_NAMES = (
    (r"^embeddings\.patch_embeddings?(?:\.projection)?\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings?(?:\.weight)?$", POSITIONS),
    (r"^embeddings\.(?:cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.(?:distillation_token|register_tokens)$", "reg_token"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(?:post_)?layernorm\.", "norm."),
    (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.(?:attention\.attention|self_attn|attention)\.([qkv])(?:uery|ey|alue|_proj)\.", r".attn.\1."),
    (r"\.(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
    (r"\.(?:intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
    (r"\.(?:output\.dense|mlp\.weights_out|mlp\.down_proj)\.", ".mlp.fc2."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.(?:layer_norm1|layernorm_before)\.", ".norm1."),
    (r"\.(?:layer_norm2|layernorm_after)\.", ".norm2."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.in_proj_", "attn_pool.in_proj."),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
)
_PATCHES = re.compile(r"^(.*)embeddings\.patch_embeddings?(?:\.projection)?\.weight$")
_PARTS = ("blocks", "patch_embed", POSITIONS, "cls_token", "reg_token", "norm", "norm_pre", "attn_pool")
_CLASSIFIER = {"classifier": "head"}
_DEIT_HEADS = {**_CLASSIFIER, "cls_classifier": "head", "distillation_classifier": "head_dist"}
_DINOV2_DEFAULTS = {"mlp_ratio": 4.0, "patch_size": 14}
_DINOV3_DEFAULTS = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "layer_norm_eps": 1e-5}
_SIGLIP_KIND = _Kind(_siglip, _CLASSIFIER, {"hidden_act": "gelu_pytorch_tanh"})
_CLIP_KIND = _Kind(_clip, {}, {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "patch_size": 32})
HUGGINGFACE = {
    "vit": _Kind(_vit, _CLASSIFIER, {"layer_norm_eps": 1e-12}),
    "deit": _Kind(_vit, _DEIT_HEADS, {"layer_norm_eps": 1e-12}),
    "dinov2": _Kind(_dinov2, {}, _DINOV2_DEFAULTS),
    "dinov2_with_registers": _Kind(_dinov2, {}, {**_DINOV2_DEFAULTS, "num_register_tokens": 4}, antialias=True),
    "dinov3_vit": _Kind(_dinov3, {}, _DINOV3_DEFAULTS, scale=r".gamma_\1"),
    "siglip": _SIGLIP_KIND,
    "siglip_vision_model": _SIGLIP_KIND,
    "clip": _CLIP_KIND,
    "clip_vision_model": _CLIP_KIND,
}


def is_huggingface(folder: Path) -> bool:
    """Whether a folder has a config of transformers; one of timm's hub names an architecture instead."""
    if not (folder / CONFIG).exists():
        return False
    found = read_json(folder / CONFIG, dict[str, Any])
    return "model_type" in found and "architecture" not in found


def load_huggingface(folder: Path, image_size: int | None = None, head: Head = "classes") -> TimmCheckpoint:
    """Loads a ViT, DeiT, DINOv2, DINOv3, SigLIP or CLIP's vision network from a folder of transformers.

    Args:
        folder: as ``save_pretrained`` writes it; weights may be in shards.
        image_size: side length of the input in pixels; position embeddings are interpolated as transformers does.
            Defaults to the size that ``preprocessor_config.json`` gives images.
        head: what the network computes (:class:`illama.options.SourceOptions`).

    Raises:
        UserError: a file is missing or damaged, the network is of another kind, or its weights do not fit its config.
    """
    if not is_huggingface(folder):
        raise UserError(f"{folder} is not a folder of Hugging Face, whose {CONFIG} has a model_type")
    config = read_json(folder / CONFIG, _Config, "ignore")
    kind = HUGGINGFACE.get(config.model_type)
    if kind is None:
        raise UserError(
            f"{folder} holds a {config.model_type!r} of Hugging Face, which is not supported; supported are "
            f"{', '.join(HUGGINGFACE)}"
        )
    vision = _vision(folder, config, kind)
    processor = find_processor(folder)
    preprocessing = read_preprocessing(processor, config.model_type, vision.num_channels, image_size)
    side, patch = preprocessing.size[0], vision.patch_size
    if side % patch or (side // patch) ** 2 > MOST_PATCHES:
        raise UserError(
            f"images of {side} pixels do not fit patches of {patch}: give --image-size, a multiple of {patch}"
        )
    files, content, _ = read_folder(folder, ())
    check_finite(content, files[0])
    try:
        state = _renamed(content, kind, vision, config, head, files[0])
        outputs = len(state["head.weight"]) if "head.weight" in state else 0
        make = partial(kind.make, vision, {"img_size": side, "num_classes": outputs}, state)
        with torch.device("meta"):  # shapes without memory or initial values
            outline = make()
        _fit_positions(state, outline, kind.antialias)
    except _MISFITS as error:
        raise UserError(f"{files[0]} does not fit its {CONFIG}: {' '.join(str(error).split())[:100]}") from error
    check_state(outline.state_dict(), state, files[0], f"its {CONFIG}")
    vit = make().eval()
    vit.load_state_dict({name: value.float() for name, value in state.items()})
    cast(Any, vit).pretrained_cfg = {"architecture": config.model_type}
    keep_features(vit, head)
    classes = tuple(config.id2label[number] for number in sorted(config.id2label))
    classes = classes if len(classes) == vit.num_classes else ()
    others = (folder / CONFIG, processor, *files[1:])
    settings = asdict(replace(vision, num_register_tokens=vit.num_prefix_tokens - int(vit.cls_token is not None)))
    return TimmCheckpoint(to_quantizable(vit), preprocessing, classes, files[0], others, settings)


def create_huggingface(model_type: str, settings: Mapping[str, Any], **common: Any) -> VisionTransformer | Eva:
    """Returns timm's network for a network of transformers, with random weights.

    Args:
        model_type: one of ``HUGGINGFACE``.
        settings: ``options`` of what :func:`load_huggingface` returned.
        common: options of timm's networks, ``img_size`` and ``num_classes`` among them.

    Raises:
        UserError: a setting is wrong.
    """
    vision = parse_json(json.dumps(settings), _Vision, f"the settings of a {model_type}")
    try:
        return HUGGINGFACE[model_type].make(vision, common, {})
    except _MISFITS as error:
        raise UserError(f"the settings of a {model_type} make no network: {' '.join(str(error).split())}") from error


def _vision(folder: Path, config: _Config, kind: _Kind) -> _Vision:
    given = config.vision_config or read_json(folder / CONFIG, dict[str, Any])
    settings = {**kind.defaults, **{name: value for name, value in given.items() if value is not None}}
    return parse_json(json.dumps(settings), _Vision, f"{folder / CONFIG}", "ignore")


def _renamed(
    content: Mapping[str, Tensor], kind: _Kind, vision: _Vision, config: _Config, head: Head, path: Path
) -> dict[str, Tensor]:
    """Returns the state dict with timm's names, with the head that is wanted."""
    prefix = next((found[1] for name in content if (found := _PATCHES.match(name))), None)
    if prefix is None:
        raise UserError(f"{path} has no patch embedding: it does not hold a {config.model_type}")
    up = ".mlp.fc1_x." if vision.use_gated_mlp else ".mlp.fc1."
    names = (*_NAMES, (r"\.mlp\.up_proj\.", up), (r"\.layer_scale([12])\.lambda1$", kind.scale))
    state: dict[str, Tensor] = {}
    for name, value in content.items():
        own = name.removeprefix(prefix)
        for pattern, replacement in names:
            own = re.sub(pattern, replacement, own)
        if name.startswith(prefix) and own.partition(".")[0] in _PARTS and value.numel():  # DINOv3: 0 registers
            state[own] = value
    state |= _head(content, kind, head, path)
    if "head.weight" in state and head == "classes":  # SigLIP's classifier reads the mean of the tokens
        state = {name: value for name, value in state.items() if not name.startswith("attn_pool.")}
    if "head_dist.weight" in state:
        state["dist_token"] = state.pop("reg_token")
    _join(state, vision)
    return state


def _head(content: Mapping[str, Tensor], kind: _Kind, head: Head, path: Path) -> dict[str, Tensor]:
    """Returns the tensors of the head that is wanted, with timm's names; UserError if the file has no such head."""
    if head in ("none", "tokens"):
        return {}
    if head == "embedding":
        weight = content.get("visual_projection.weight")
        if weight is None:
            raise UserError(f"{path} has no projection into an embedding: give --head none for the pooled features")
        return {"head.weight": weight, "head.bias": torch.zeros_like(weight[:, 0])}
    found = {
        f"{theirs}.{part}": value
        for ours, theirs in kind.heads.items()
        for part in ("weight", "bias")
        if (value := content.get(f"{ours}.{part}")) is not None
    }
    if "head.weight" not in found:
        other = any(name.startswith("classifier.") for name in content)
        if "visual_projection.weight" in content:
            raise UserError(f"{path} has no classifier: give --head embedding for CLIP's projection, or --head none")
        reason = "has a classifier of the mean of its tokens, which is not supported" if other else "has no classifier"
        raise UserError(f"{path} {reason}: give --head none for the pooled features, or --head tokens")
    return found


def _join(state: dict[str, Tensor], vision: _Vision) -> None:
    """Joins q, k and v, and gives tables of tokens the shapes of timm's."""
    for attention in sorted({name.rpartition(".attn.")[0] for name in state if ".attn." in name}):
        for part in ("weight", "bias"):
            names = [f"{attention}.attn.{each}.{part}" for each in "qkv"]
            found = [state.pop(name) for name in names if name in state]
            if len(found) == 3:
                state[f"{attention}.attn.qkv.{part}"] = torch.cat(found)
            elif len(found) == 2:  # DINOv3's keys have no bias
                state |= {f"{attention}.attn.q_bias": found[0], f"{attention}.attn.v_bias": found[1]}
    for part in ("weight", "bias"):
        if (joint := state.pop(f"attn_pool.in_proj.{part}", None)) is not None:
            width = vision.hidden_size
            state |= {f"attn_pool.q.{part}": joint[:width], f"attn_pool.kv.{part}": joint[width:]}
    for name in (POSITIONS, "cls_token"):
        if name in state:
            state[name] = state[name].reshape(1, -1, vision.hidden_size)


def _fit_positions(state: dict[str, Tensor], vit: VisionTransformer | Eva, antialias: bool) -> None:
    """Interpolates the position table to the grid of ``vit``, as transformers does, and gives it timm's form.

    Raises:
        ValueError: the table has no square grid.
    """
    if POSITIONS not in state:
        return
    first = 1 if vit.no_embed_class else vit.num_prefix_tokens  # DINOv2's table has the class token, but no registers
    before, patches = state[POSITIONS][:, :first].float(), state[POSITIONS][:, first:].float()
    old, new = math.isqrt(patches.shape[1]), vit.patch_embed.grid_size
    if not old or old**2 != patches.shape[1]:
        raise ValueError(f"{patches.shape[1]} positions of patches fill no square grid")
    patches = resample_abs_pos_embed(patches, list(new), [old, old], num_prefix_tokens=0, antialias=antialias)
    if vit.no_embed_class:  # timm adds the class token's position to the token
        state["cls_token"], before = state["cls_token"].float() + before, before[:, :0]
    state[POSITIONS] = torch.cat([before, patches], 1)
