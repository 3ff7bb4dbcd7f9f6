"""timm's ViTs unchanged: loading, export and ONNX Runtime, compared with timm's network."""

import collections
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import Attention, AttentionPoolLatent, AttentionRope, RmsNorm, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer, checkpoint_filter_fn
from timm_networks import REGISTERED, build, images_for, randomise, saved

from deploy.rewrites.lower_opset import lower_opset
from illama.bundle import SHIPPED
from illama.checkpoints.load import load_checkpoint, write_weights
from illama.checkpoints.timm_checkpoint import load_timm, timm_preprocessing
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.graph.reader import load_graph
from illama.graph.writer import save_graph
from illama.models.config import TimmConfig
from illama.models.timm_vit import to_causal, to_quantizable
from illama.options import SourceOptions
from quant.export.onnx_export import export_onnx

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
# Networks to export, which takes seconds each. Together they have every part of timm that the graph depends on.
EXPORTED = {
    "qk_norm_registers_layer_scale": {"qk_norm": True, "reg_tokens": 4, "init_values": 1e-5},
    "average_of_parallel_blocks": {"class_token": False, "global_pool": "avg", "block_fn": ParallelThingsBlock},
    "latent_pool": {"class_token": False, "global_pool": "map"},
    "swiglu_rms": {"mlp_layer": SwiGLU, "norm_layer": RmsNorm},
    "distilled": {},
}
# Rotary tables of the network and of each head, pairs and halves, inner norms, keys of groups.
EXPORTED_EVAS = (
    "eva02_tiny_patch14_224",
    "eva02_base_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_mixed_224",
    "vit_base_patch16_sapiens2",
)


def run(path, images):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.numpy()})[0]


@pytest.fixture(scope="module", params=[*EXPORTED, *EXPORTED_EVAS])
def exported(request, tmp_path_factory):
    """A timm ViT, and its graphs for CPUs and for TensorRT in half precision."""
    if request.param in EXPORTED_EVAS:
        vit = build(request.param)
    else:
        torch.manual_seed(0)
        kind = VisionTransformerDistilled if request.param == "distilled" else VisionTransformer
        vit = randomise(kind(img_size=32, num_classes=5, **SMALL, **EXPORTED[request.param]))
    folder = tmp_path_factory.mktemp(request.param)
    export_onnx(to_quantizable(vit), folder / "plain.onnx", "plain")
    export_onnx(to_quantizable(vit), folder / "fused.onnx", "fused", torch.float16)
    return vit, folder


@pytest.mark.parametrize(("form", "tolerance"), [("plain", 1e-5), ("fused", 1e-2)])
@pytest.mark.parametrize("opset", [17, 21])
def test_older_opsets_equal_timm_s_network(exported, form, tolerance, opset, tmp_path):
    vit, folder = exported
    images = torch.randn(2, 3, 32, 32)
    graph = load_graph(folder / f"{form}.onnx")
    lower_opset(graph, opset, {"LayerNormalization"} if opset == 17 else ())  # which TensorRT 8.5 does not have
    save_graph(graph, tmp_path / "model.onnx")
    with torch.no_grad():
        expected = vit(images).numpy()
    found = run(tmp_path / "model.onnx", images)
    assert np.abs(found - expected).max() < tolerance * max(1, np.abs(expected).max())


@pytest.mark.parametrize(("form", "tolerance"), [("plain", 1e-5), ("fused", 1e-2)])
def test_the_exported_graph_equals_timm_s_network(exported, form, tolerance):
    vit, folder = exported
    for batch in (1, 3):
        images = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            expected = vit(images)
        error = np.abs(run(folder / f"{form}.onnx", images) - expected.numpy()).max()
        assert error < tolerance * max(1, expected.abs().max())


def test_every_attention_and_every_norm_is_one_operator(exported):
    vit, folder = exported
    nodes = onnx.load(folder / "fused.onnx").graph.node
    kinds = collections.Counter(node.op_type for node in nodes)
    kept = (Attention, AttentionPoolLatent, EvaAttention, AttentionRope)
    attentions = sum(isinstance(module, kept) for module in vit.modules())
    assert kinds["Attention"] == attentions >= 2 and kinds["Softmax"] == 0
    assert all(len(node.input) == 3 for node in nodes if node.op_type == "Attention"), "an attention has a mask"
    norms = sum(isinstance(module, torch.nn.LayerNorm | RmsNorm) for module in vit.modules())
    assert kinds["LayerNormalization"] + kinds["RMSNormalization"] == norms >= 5


def test_a_rotation_is_one_operator(exported):
    vit, folder = exported
    nodes = onnx.load(folder / "plain.onnx").graph.node
    rotary = getattr(vit, "rope", None) is not None
    assert sum(node.op_type == "RotaryEmbedding" for node in nodes) == 2 * len(vit.blocks) * rotary


def test_norms_are_computed_in_float32_in_half_precision(exported):
    model = onnx.shape_inference.infer_shapes(onnx.load(exported[1] / "fused.onnx"), data_prop=True)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    inputs = {
        kind: {types[node.input[0]] for node in model.graph.node if node.op_type in kinds}
        for kind, kinds in (
            ("norm", ("LayerNormalization", "RMSNormalization")),
            ("product", ("Attention", "MatMul", "Gelu")),
        )
    }
    assert inputs == {"norm": {onnx.TensorProto.FLOAT}, "product": {onnx.TensorProto.FLOAT16}}


def test_in_float32_the_fused_graph_equals_timm_s_network(tmp_path):
    vit, images = build("plain"), images_for("")
    export_onnx(to_quantizable(vit), tmp_path / "model.onnx", "fused")
    with torch.no_grad():
        expected = vit(images).numpy()
    assert np.abs(run(tmp_path / "model.onnx", images) - expected).max() < 1e-5 * max(1, np.abs(expected).max())


def test_tokens_are_not_reordered_without_a_mask(tmp_path):
    """The causal network reorders tokens twice; this one only puts the class token before the patches."""
    joins = []
    for make in (to_quantizable, to_causal):
        export_onnx(make(build("plain")), tmp_path / "model.onnx", "plain")
        nodes = onnx.load(tmp_path / "model.onnx").graph.node
        joins.append(sum(node.op_type == "Concat" for node in nodes))
    assert joins[0] == joins[1] - 2


@pytest.mark.parametrize("name", sorted(REGISTERED))
@pytest.mark.parametrize(
    ("suffix", "key"), [(".safetensors", None), (".pth", None), (".pth", "model"), (".pth", "state_dict")]
)
def test_a_loaded_file_equals_timm_s_network(name, suffix, key, tmp_path):
    vit, path = saved(tmp_path, name, suffix, key)
    checkpoint = load_timm(name, path, image_size=32 if name == "small_vit_no_table" else None)
    assert checkpoint.model.config == TimmConfig(name, 32, 3, 5)
    assert checkpoint.weights == path and checkpoint.classes == () and not checkpoint.model.training
    images = images_for("")
    with torch.no_grad():
        torch.testing.assert_close(checkpoint.model(images), vit(images), atol=1e-5, rtol=1e-4)


def test_classes_channels_and_size_are_read_from_the_file(tmp_path):
    vit, path = saved(tmp_path, "small_vit_plain", num_classes=7, in_chans=1, img_size=48)
    checkpoint = load_timm("small_vit_plain", path)
    assert checkpoint.model.config == TimmConfig("small_vit_plain", 48, 1, 7)
    images = torch.randn(2, 1, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(checkpoint.model(images), vit(images), atol=1e-5, rtol=1e-4)
    assert checkpoint.preprocessing.in_channels == 1 and len(checkpoint.preprocessing.mean) == 1


@pytest.mark.parametrize(
    "name",
    [
        "small_vit_plain",
        "small_vit_registers",
        "small_vit_registers_in_table",
        "small_vit_average",
        "small_vit_no_table",
    ],
)
def test_another_size_equals_timm_s_resizing(name, tmp_path):
    vit, path = saved(tmp_path, name)
    vit.set_input_size((48, 48))
    checkpoint = load_timm(name, path, image_size=48)
    assert checkpoint.model.config.image_size == checkpoint.preprocessing.size[0] == 48
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(checkpoint.model(images), vit(images), atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="image_size 50 is not a multiple of patch_size 8"):
        load_timm(name, path, image_size=50)


def test_half_precision_weights_are_loaded_as_float32(tmp_path):
    vit, path = saved(tmp_path, "small_vit_plain")
    save_file(vit.half().state_dict(), path)
    assert {value.dtype for value in load_timm("small_vit_plain", path).model.parameters()} == {torch.float32}


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@pytest.mark.parametrize(
    ("name", "resize", "numbers"),
    [
        ("vit_tiny_patch16_224", 248, HALF),
        ("deit_tiny_patch16_224", 248, IMAGENET),
        ("deit3_small_patch16_224", 248, IMAGENET),
        ("vit_small_patch14_dinov2", 224, IMAGENET),
        ("vit_base_patch16_clip_224.laion2b_ft_in1k", 224, CLIP),
    ],
)
def test_the_preprocessing_equals_timm_s(name, resize, numbers, tmp_path):
    vit = timm.create_model(name, num_classes=5, img_size=224, depth=1, embed_dim=32, num_heads=2)
    own = timm.data.create_transform(**timm.data.resolve_model_data_config(vit) | {"input_size": (3, 224, 224)})
    ours = timm_preprocessing(vit, (224, 224), 3)
    assert ours == Preprocessing((224, 224), 3, **numbers, resize=resize)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((300, 260), Image.Resampling.BICUBIC)
    assert (ours.transform()(image) - own(image)).abs().max() < 1e-5


def test_squashed_images_are_warped():
    vit = timm.create_model("vit_base_patch16_clip_384.openai_ft_in1k", depth=1, embed_dim=32, num_heads=2)
    assert timm_preprocessing(vit, (384, 384), 3) == Preprocessing((384, 384), 3, **CLIP, resize=None)


@pytest.mark.parametrize("asked", [None, 96])
def test_a_hybrid_is_loaded_in_its_size_and_in_another(asked, tmp_path):
    torch.manual_seed(0)
    options = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    name, path, sizes = "vit_tiny_r_s16_p8_224", tmp_path / "hybrid.safetensors", {"in_chans": 1, "num_classes": 5}
    vit = randomise(timm.create_model(name, **options, **sizes, img_size=64))
    save_file(vit.state_dict(), path)
    model = load_timm(name, path, asked, options).model
    assert model.config == TimmConfig(name, asked or 64, 1, 5)
    if asked:
        vit = timm.create_model(name, **options, **sizes, img_size=asked).eval()
        vit.load_state_dict(checkpoint_filter_fn(load_file(path), vit))
    images = torch.randn(2, 1, asked or 64, asked or 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), vit(images), atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="multiple of"):
        load_timm(name, path, 80, options)


@pytest.mark.parametrize(
    ("name", "identifier"),
    [
        ("resnet18", "ResNet"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer.*windows"),
        ("mvitv2_tiny", "MultiScaleVit.*resolutions"),
        ("naflexvit_base_patch16_gap", "NaFlexVit.*not fixed"),
        ("eva02_tiny_patch14_224", "less than half|does not fit"),
        ("vit_base_mci_224", "patches come from"),
        ("illama_tiny", "ILLaMA"),
        ("vit_tny_patch16_224", "'vit_tny_patch16_224'.* vit_tiny_patch16_224 or "),
        ("hf-hub:timm/vit_tiny_patch16_224", "'hf-hub:timm/vit_tiny_patch16_224'"),
        ("", "--model timm:NAME"),
        ("vit_tiny_patch16_224.nobody", "Invalid pretrained tag"),
    ],
)
def test_other_networks_are_rejected(name, identifier, tmp_path):
    _, path = saved(tmp_path, "small_vit_plain")
    with pytest.raises(UserError, match=identifier) as caught:
        load_timm(name, path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "identifier"),
    [
        (lambda state: state["norm.weight"].fill_(float("nan")), "NaN .*norm.weight"),
        (lambda state: state.pop("norm.weight"), "small_vit_plain: norm.weight is missing"),
        (lambda state: state.update(extra=torch.zeros(1)), "extra is unknown"),
        (lambda state: state.update({"norm.weight": torch.zeros(8)}), r"\(8,\), .* \(32,\)"),
        (lambda state: state.update({"norm.weight": torch.zeros(32).int()}), "int32 .*norm.weight"),
        (lambda state: state.pop("head.weight"), "head.weight"),
        (lambda state: state.pop("patch_embed.proj.weight"), "patch_embed.proj.weight"),
        (lambda state: state.update({"pos_embed": torch.zeros(1, 15, 32)}), r"\(1, 15, 32\)"),
        (lambda state: state.update({"pos_embed": torch.zeros(17, 32)}), r"\(17, 32\)"),
    ],
)
def test_wrong_weights_are_rejected(change, identifier, tmp_path):
    vit, path = saved(tmp_path, "small_vit_plain")
    state = dict(vit.state_dict())
    change(state)
    save_file(state, path)
    with pytest.raises(UserError, match=identifier) as caught:
        load_timm("small_vit_plain", path)
    assert "\n" not in str(caught.value)


def test_layer_scale_without_its_name_is_rejected(tmp_path):
    _, path = saved(tmp_path, "small_vit_layer_scale")
    with pytest.raises(UserError, match=r"blocks\.0\.ls1.gamma is unknown"):
        load_timm("small_vit_plain", path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kept", [0, 10, 5000])
def test_a_truncated_file_is_rejected(suffix, kept, tmp_path):
    _, path = saved(tmp_path, "small_vit_plain", suffix)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"truncated|more than tensors"):
        load_timm("small_vit_plain", path)


def test_bundles_and_folders_are_rejected(tmp_path, small_bundle):
    for path, identifier in (
        (SHIPPED, "bundle.*--model"),
        (tmp_path, "folder"),
        (tmp_path / "nothing.pth", "nothing.pth"),
    ):
        with pytest.raises(UserError, match=identifier):
            load_timm("vit_tiny_patch16_224", path)


def test_an_illama_s_weights_are_rejected(tmp_path):
    model = load_checkpoint(SHIPPED).model
    write_weights(model.state_dict(), model.config, tmp_path / "illama.safetensors")
    with pytest.raises(UserError, match=r"iLLaMA.*--model"):
        load_timm("vit_tiny_patch16_224", tmp_path / "illama.safetensors")


def test_timm_s_weights_are_rejected_as_an_illama(tmp_path):
    _, path = saved(tmp_path, "small_vit_plain")
    with pytest.raises(UserError, match="--model timm:NAME"):
        load_checkpoint(path)


def test_ptq_accepts_a_timm_network(tmp_path, image_folder, small_bundle):
    from quant.inputs import open_inputs

    _, path = saved(tmp_path, "small_vit_registers", num_classes=3)
    options = SourceOptions(path, "timm:small_vit_registers", str(image_folder))
    assert open_inputs(options).model.config == TimmConfig("small_vit_registers", 32, 3, 3)
    assert open_inputs(replace(options, image_size=48)).preprocessing.size == (48, 48)
    with pytest.raises(UserError, match="is a bundle"):
        open_inputs(replace(options, checkpoint=small_bundle))
