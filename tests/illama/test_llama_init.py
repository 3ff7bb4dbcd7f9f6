"""Initial values from a LLaMA: every element, the function of the RoPE layout, memory, and errors."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from support import ROOT

from illama import ILLaMA, ModelConfig
from illama.checkpoints.llama_init import evenly_spaced, initialize_from_llama
from illama.errors import UserError

SMALL = ModelConfig(image_size=32, patch_size=8, width=32, depth=2, heads=2, num_classes=3)  # hidden 256, head_dim 16
LLAMA = {
    "model_type": "llama",
    "hidden_size": 192,
    "num_hidden_layers": 5,
    "intermediate_size": 600,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}


def _shapes(config):
    """Returns Hugging Face's names and shapes."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim", width // config["num_attention_heads"])
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (7, width)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (queries, width),
            f"{layer}.self_attn.k_proj.weight": (keys, width),
            f"{layer}.self_attn.v_proj.weight": (keys, width),
            f"{layer}.self_attn.o_proj.weight": (width, queries),
            f"{layer}.mlp.gate_proj.weight": (hidden, width),
            f"{layer}.mlp.up_proj.weight": (hidden, width),
            f"{layer}.mlp.down_proj.weight": (width, hidden),
            f"{layer}.input_layernorm.weight": (width,),
            f"{layer}.post_attention_layernorm.weight": (width,),
        }
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (7, width)}


def _tensors(config, dtype=torch.float16):
    """Returns random weights of these shapes."""
    generator = torch.Generator().manual_seed(0)
    return {name: (torch.randn(shape, generator=generator) * 0.2).to(dtype) for name, shape in _shapes(config).items()}


def _write(folder, config, tensors, shards=2):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {tensor: names[i % shards] for i, tensor in enumerate(tensors)}
    for name in names:
        save_file({t: tensors[t] for t in tensors if weight_map[t] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def llama(tmp_path):
    return _write(tmp_path / "llama", LLAMA, _tensors(LLAMA))


def _model(config=SMALL):
    torch.manual_seed(0)
    return ILLaMA(config).eval()


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_element_is_the_expected_one(tmp_path, dtype, shards):
    """6 heads of 32 to 2 of 16, 192 channels to 32, 600 hidden to 256, 5 layers to 2."""
    tensors = _tensors(LLAMA, dtype)
    model, before = _model(), _model().state_dict()
    initialize_from_llama(model, _write(tmp_path / "llama", LLAMA, tensors, shards))
    channels = [6 * i for i in range(32)]
    hidden = [round(i * 599 / 255) for i in range(256)]
    rows = []
    for head in (0, 3):
        for j in range(8):  # every second of 16 pairs, from half-split (p, p + 16) to interleaved (2j, 2j + 1)
            rows += [32 * head + 2 * j, 32 * head + 2 * j + 16]
    after = model.state_dict()
    for block, layer in ((0, 0), (1, 4)):
        ours = {name.removeprefix(f"blocks.{block}."): value for name, value in after.items()}
        theirs = {name.removeprefix(f"model.layers.{layer}."): value.float() for name, value in tensors.items()}
        for part, name in enumerate("qkv"):
            expected = [[theirs[f"self_attn.{name}_proj.weight"][r, c] for c in channels] for r in rows]
            assert torch.equal(ours["attn.qkv.weight"][32 * part : 32 * part + 32], torch.tensor(expected))
        grids = {
            "attn.proj.weight": ("self_attn.o_proj.weight", channels, rows),
            "mlp.fc1.weight": ("mlp.gate_proj.weight", hidden, channels),
            "mlp.fc3.weight": ("mlp.up_proj.weight", hidden, channels),
            "mlp.fc2.weight": ("mlp.down_proj.weight", channels, hidden),
        }
        for mine, (other, down, across) in grids.items():
            assert torch.equal(ours[mine], torch.tensor([[theirs[other][r, c] for c in across] for r in down])), mine
        assert torch.equal(ours["norm1.weight"], theirs["input_layernorm.weight"][::6])
        assert torch.equal(ours["norm2.weight"], theirs["post_attention_layernorm.weight"][::6])
        assert not ours["attn.qkv.bias"].any() and not ours["attn.proj.bias"].any()
    assert torch.equal(after["norm.weight"], tensors["model.norm.weight"].float()[::6])
    for name in ("pos_embed", "cls_token", "patch_embed.proj.weight", "head.weight", "head.bias"):
        assert torch.equal(after[name], before[name])
    assert all(value.dtype == torch.float32 for value in after.values())


@pytest.mark.parametrize(("count", "of"), [(192, 4096), (3, 32), (12, 32), (512, 11008), (5, 5), (1, 7)])
def test_selections_are_increasing_and_evenly_spaced(count, of):
    indices = evenly_spaced(count, of)
    steps = indices.diff()
    assert len(indices) == count and indices[0] == 0 and indices[-1] < of
    assert (steps > 0).all()
    assert count == 1 or steps.max() - steps.min() <= 1


def _hugging_face_layer(x, tensors, config, theta=10000.0):
    """Computes a LLaMA decoder layer as transformers does (half-split rotate_half, repeat_kv), unmasked, in float64."""
    w = {name.removeprefix("model.layers.0."): value.double() for name, value in tensors.items()}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim", config["hidden_size"] // heads)

    def norm(y, weight):
        return weight * y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)

    def rotate_half(y):
        return torch.cat([-y[..., size // 2 :], y[..., : size // 2]], dim=-1)

    angles = torch.outer(torch.arange(len(x)).double(), theta ** -(torch.arange(0, size, 2).double() / size))
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
    y = norm(x, w["input_layernorm.weight"])
    q = (y @ w["self_attn.q_proj.weight"].T).view(len(x), heads, size).transpose(0, 1)
    k, v = ((y @ w[f"self_attn.{n}_proj.weight"].T).view(len(x), groups, size).transpose(0, 1) for n in "kv")
    k, v = (part.repeat_interleave(heads // groups, dim=0) for part in (k, v))
    q, k = (part * cos + rotate_half(part) * sin for part in (q, k))
    scores = q @ k.transpose(1, 2) / size**0.5
    x = x + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ w["self_attn.o_proj.weight"].T
    y = norm(x, w["post_attention_layernorm.weight"])
    gate, up = y @ w["mlp.gate_proj.weight"].T, y @ w["mlp.up_proj.weight"].T
    return scores, x + (torch.nn.functional.silu(gate) * up) @ w["mlp.down_proj.weight"].T


@pytest.mark.parametrize("key_value_heads", [4, 2, 1], ids=["multi-head", "grouped", "multi-query"])
def test_at_equal_size_a_block_equals_the_llama_layer(tmp_path, key_value_heads):
    """All elements are selected, so heads, RoPE layout, the order of q, k and v and the MLP are tested by function."""
    config = ModelConfig(image_size=32, patch_size=8, width=64, depth=1, heads=4, mask="bidirectional")
    llama = {
        **LLAMA,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": key_value_heads,
    }
    tensors = _tensors(llama, torch.float32)
    model = _model(config)
    initialize_from_llama(model, _write(tmp_path / "llama", llama, tensors))
    model.double()
    x = torch.randn(config.tokens, 64, dtype=torch.float64)
    scores, expected = _hugging_face_layer(x, tensors, llama)
    with torch.no_grad():
        attention, y = model.blocks[0].attn, model.blocks[0].norm1(x[None])
        seen = {}
        attention.core.register_forward_pre_hook(lambda _, inputs: seen.update(q=inputs[0], k=inputs[1]))
        model.rotation = model.rotation.double()
        out = model.blocks[0](x[None], model.attention_mask("bidirectional", model.causal), model.rotation)
        assert y.shape == (1, config.tokens, 64)
    # The rotary table is computed in float64 and kept in float32.
    assert (seen["q"] @ seen["k"].transpose(2, 3) / 4 - scores).abs().max() < 1e-5 * scores.abs().max()
    assert (out[0] - expected).abs().max() < 1e-5 * expected.abs().max()


def test_pairs_of_a_selected_head_keep_their_frequencies(tmp_path):
    """Heads of 32 to 16: the scores of the small head are those of the large one over the selected pairs."""
    llama = {
        **LLAMA,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "intermediate_size": 256,
        "head_dim": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    tensors = _tensors(llama, torch.float32)
    kept = tensors | {}
    dropped = [row for head in (0, 32) for pair in range(1, 16, 2) for row in (head + pair, head + pair + 16)]
    name = "model.layers.0.self_attn.q_proj.weight"
    kept[name] = tensors[name].clone()
    kept[name][dropped] = 0  # a zero pair of q adds nothing to the scores
    config = replace(SMALL, depth=1, mask="bidirectional")
    model = _model(config)
    initialize_from_llama(model, _write(tmp_path / "llama", llama, tensors))
    model.double()
    model.rotation = model.rotation.double()
    x = torch.randn(config.tokens, 32, dtype=torch.float64)
    seen = {}
    model.blocks[0].attn.core.register_forward_pre_hook(lambda _, inputs: seen.update(q=inputs[0], k=inputs[1]))
    with torch.no_grad():
        model.blocks[0](x[None], model.attention_mask("bidirectional", model.causal), model.rotation)
    scores, _ = _hugging_face_layer(x, kept, llama)
    ours = seen["q"] @ seen["k"].transpose(2, 3)
    assert (ours - scores * 32**0.5).abs().max() < 1e-5 * ours.abs().max()


def _write_holes(path, shapes):
    """Writes a sparse float16 .safetensors of zeros, which takes no space on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


MEASURE = """
import sys
from pathlib import Path
from illama import ILLaMA, ModelConfig
from illama.checkpoints.llama_init import initialize_from_llama

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

model = ILLaMA(ModelConfig.preset("base", depth=4))
before = peak()
initialize_from_llama(model, Path(sys.argv[1]))
assert not model.norm.weight.any(), "the weights were not read"
print(peak() - before)
"""


def test_memory_is_that_of_one_tensor_at_the_sizes_of_llama2_7b(tmp_path):
    """13 GB in two shards, the largest tensor 86 MiB, measured in a new process.

    Base's widths and 4 blocks; 12 blocks take the same, since no tensor is kept.
    Open files would take 1.2 GiB, and converting whole tensors 290 MiB.
    """
    config = {
        **LLAMA,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    }
    shapes = _shapes(config)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {name: names[i >= len(shapes) // 2] for i, name in enumerate(shapes)}
    for file in names:
        _write_holes(tmp_path / file, {name: shape for name, shape in shapes.items() if weight_map[name] == file})
    assert sum((tmp_path / file).stat().st_size for file in names) > 12.9e9
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 200, "MiB"


def _expect(folder, identifier, config=SMALL):
    with pytest.raises(UserError, match=identifier) as caught:
        initialize_from_llama(_model(config), folder)
    assert "\n" not in str(caught.value)


def _edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_missing_or_damaged_file_is_named(llama, tmp_path):
    _expect(tmp_path / "nowhere", "nowhere/config.json")
    second = llama / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    _expect(llama, "00002-of-00002.safetensors")
    second.unlink()
    _expect(llama, "00002-of-00002.safetensors")
    (llama / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    _expect(llama, "weight_map")
    (llama / "model.safetensors.index.json").unlink()
    _expect(llama, "model.safetensors .*model.safetensors.index.json")
    (llama / "model.safetensors").write_bytes(b"short")
    _expect(llama, "model.safetensors")
    (llama / "config.json").write_text("{")
    _expect(llama, "config.json is damaged")
    (llama / "config.json").write_text('{"model_type": "llama"}')
    _expect(llama, "config.json")


@pytest.mark.parametrize(
    ("values", "identifier"),
    [
        ({"model_type": "gemma"}, "'gemma'"),
        ({"hidden_size": 24}, "width .*24.* 32 "),
        ({"num_hidden_layers": 1}, "depth .*1.* 2 "),
        ({"num_attention_heads": 1}, "heads .*1.* 2 "),
        ({"num_attention_heads": 24, "num_key_value_heads": 24}, "head_dim .*8.* 16 "),
        ({"intermediate_size": 255}, "hidden .*255.* 256 "),
        ({"num_key_value_heads": 4}, "6 heads .* 4 key-value heads"),
        ({"num_key_value_heads": 3}, r"k_proj.weight .*\(192, 192\).*config.json.*\(96, 192\)"),
        ({"intermediate_size": 599}, r"gate_proj.weight .*\(600, 192\)"),
    ],
)
def test_a_llama_that_does_not_fit_is_rejected(llama, values, identifier):
    _edit_config(llama, **values)
    _expect(llama, identifier)


def test_other_names_and_nan_are_rejected(tmp_path):
    tensors = _tensors(LLAMA)
    names = {name.replace("self_attn", "attention"): value for name, value in tensors.items()}
    _expect(_write(tmp_path / "names", LLAMA, names), "model.layers.0.self_attn.q_proj.weight")
    tensors["model.layers.4.mlp.down_proj.weight"][0] = float("nan")
    folder = _write(tmp_path / "nan", LLAMA, tensors)
    _expect(folder, "NaN .*model.layers.4.mlp.down_proj.weight")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    other = dict.fromkeys(index["weight_map"], "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": other}))
    _expect(folder, "model-00001-of-00002.safetensors.*self_attn.q_proj.weight")


def test_a_network_with_other_norms_or_mlps_is_rejected(llama):
    _expect(llama, "norm layer", replace(SMALL, norm="layer"))
    _expect(llama, "mlp gelu", replace(SMALL, mlp="gelu"))
