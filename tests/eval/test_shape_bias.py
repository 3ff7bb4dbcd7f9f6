"""The published class mapping against timm's list of WordNet IDs, and a network whose decisions are known."""

import json

import numpy as np
import pytest
from PIL import Image
from support import assert_one_line_error, write_linear_bundle
from timm.data import ImageNetInfo

from eval.metrics.cue_conflict import FINE_CLASSES, SHAPE_CLASSES, Stimuli, decide, shape_bias

# The authors' WordNet IDs of these classes, those that are in ImageNet-1k.
WORDNET = {
    "airplane": "n02690373",
    "bear": "n02132136 n02133161 n02134084 n02134418",
    "bicycle": "n02835271 n03792782",
    "boat": "n02951358 n03344393 n03662601 n04273569 n04612504",
    "bottle": "n02823428 n03937543 n03983396 n04557648 n04560804 n04579145 n04591713",
    "car": "n02814533 n03100240 n04285008",
    "cat": "n02123045 n02123159 n02123394 n02123597 n02124075 n02125311",
    "chair": "n02791124 n03376595 n04099969 n04429376",
    "clock": "n02708093 n03196217 n04548280",
    "elephant": "n02504013 n02504458",
    "keyboard": "n03085013 n04505470",
    "knife": "n03041632",
    "oven": "n04111531",
    "truck": "n03345487 n03417042 n03770679 n03796401 n03930630 n03977966 n04461696 n04467665",
}


def test_the_mapping_is_the_published_one():
    info = ImageNetInfo()
    wordnet = [info.index_to_label_name(index) for index in range(1000)]
    assert wordnet == sorted(wordnet)
    for name, published in WORDNET.items():
        assert [wordnet[index] for index in FINE_CLASSES[name]] == published.split()
    for name, low, high in (("bird", "n01514668", "n02056570"), ("dog", "n02085620", "n02113978")):
        assert all(low <= wordnet[index] <= high for index in FINE_CLASSES[name])
    # The authors' numbers of both, and some ImageNet classes that they leave out, such as hens and toy breeds.
    assert (len(FINE_CLASSES["bird"]), len(FINE_CLASSES["dog"])) == (49, 109)
    assert not {9, 17, 21, 84, 97, 134} & set(FINE_CLASSES["bird"])
    assert not {151, 192, 204, 227, 242, 251, 258, 260, 264} & set(FINE_CLASSES["dog"])
    everything = [index for places in FINE_CLASSES.values() for index in places]
    assert len(everything) == len(set(everything)) and len(SHAPE_CLASSES) == 16


def test_the_mean_of_the_fine_classes_decides_and_not_their_sum_or_maximum():
    logits = np.full((1, 1000), -20.0, np.float32)
    logits[0, list(FINE_CLASSES["bird"])] = 1.0  # a larger sum
    logits[0, FINE_CLASSES["truck"][0]] = 2.0  # a larger maximum
    logits[0, FINE_CLASSES["knife"][0]] = 1.5  # the largest mean
    assert decide(logits) == ["knife"]
    with pytest.raises(ValueError, match="1000"):
        decide(np.zeros((1, 10), np.float32))


def test_the_bias_by_hand():
    shapes, textures = ["cat", "cat", "cat", "dog", "dog"], ["dog", "car", "cat", "cat", "bear"]
    result = shape_bias(np.array(["cat", "car", "cat", "oven", "dog"]), shapes, textures)
    assert (result.images, result.shape, result.texture) == (4, 2, 1)
    assert result.bias == pytest.approx(2 / 3)
    assert result.by_class["cat"] == 0.5 and result.by_class["dog"] == 1 and result.by_class["oven"] is None


@pytest.fixture
def directions():
    """A direction in color space for each class, far from the others: points of a Fibonacci sphere."""
    height = 1 - (2 * np.arange(16) + 1) / 16
    angle = np.pi * (3 - np.sqrt(5)) * np.arange(16)
    around = np.sqrt(1 - height**2)
    return np.stack([around * np.cos(angle), around * np.sin(angle), height], axis=1)


@pytest.fixture
def bundle(directions, tmp_path):
    """A network that recognizes each of 16 colors, and predicts all ImageNet classes of its class."""
    weights = np.zeros((3, 8 * 8, 1000))
    for direction, places in zip(directions, FINE_CLASSES.values(), strict=True):
        weights[:, :, list(places)] = direction[:, None, None]
    info = ImageNetInfo()
    classes = [info.index_to_label_name(index) for index in range(1000)]
    return write_linear_bundle(tmp_path / "imagenet", weights.reshape(-1, 1000), 8, classes)


@pytest.fixture
def stimuli(directions, tmp_path):
    """Every shape with every texture. The color is that of the shape, for each third texture that of the texture, and
    for each fifth that of a third class."""
    folder = tmp_path / "stimuli"
    for i, shape in enumerate(SHAPE_CLASSES):
        (folder / shape).mkdir(parents=True)
        for j, texture in enumerate(SHAPE_CLASSES):
            seen = (i + j + 1) % 16 if j % 5 == 4 else j if j % 3 == 2 else i
            color = tuple(round(127.5 + 100 * part) for part in directions[seen])
            Image.new("RGB", (12, 12), color).save(folder / shape / f"{shape}{i + 1}-{texture}{j}.png")
    return folder


def _expected():
    shape = texture = 0
    for i in range(16):
        for j in range(16):
            seen = (i + j + 1) % 16 if j % 5 == 4 else j if j % 3 == 2 else i
            if i != j:
                shape, texture = shape + (seen == i), texture + (seen == j)
    return shape, texture


def test_the_command_on_a_set_whose_answer_is_known(bundle, stimuli, tmp_path, run_here):
    result = run_here("eval/shape_bias.py", bundle, "--stimuli", stimuli, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    shape, texture = _expected()
    assert shape > texture > 50
    bias, neither = shape / (shape + texture) * 100, 240 - shape - texture
    figures = json.loads((tmp_path / "out" / "shape-bias.json").read_text())["models"]["imagenet"]
    assert (figures["bias"], figures["images"]) == (pytest.approx(bias / 100), 240)
    assert f"| imagenet | {bias:.2f} | {shape} | {texture} | {neither} | 240 |" in result.stdout
    assert all(f"\n| {name} | " in result.stdout for name in SHAPE_CLASSES)


def test_mistakes_are_one_line(bundle, stimuli, small_bundle, tmp_path, run_here):
    assert len(Stimuli(stimuli)) == 256
    few = write_linear_bundle(tmp_path / "few", np.zeros((3 * 64, 3)), 8, ["a", "b", "c"])
    assert_one_line_error(run_here("eval/shape_bias.py", few, "--stimuli", stimuli), str(few), "1,000", "3")
    mixed = write_linear_bundle(
        tmp_path / "mixed", np.zeros((3 * 64, 1000)), 8, [f"n{index:08}" for index in range(1000, 0, -1)]
    )
    assert_one_line_error(run_here("eval/shape_bias.py", mixed, "--stimuli", stimuli), str(mixed), "WordNet")
    infinite = write_linear_bundle(
        tmp_path / "infinite", np.full((3 * 64, 1000), np.inf), 8, [str(i) for i in range(1000)]
    )
    assert_one_line_error(run_here("eval/shape_bias.py", infinite, "--stimuli", stimuli), "infinite: 256 of 256")
    assert_one_line_error(run_here("eval/shape_bias.py", bundle, "--stimuli", tmp_path / "no"), str(tmp_path / "no"))
    assert_one_line_error(run_here("eval/shape_bias.py", small_bundle, "--stimuli", stimuli), "quant/ptq.py")
    (stimuli / "cat" / "cat1-house2.png").write_bytes(b"")
    assert_one_line_error(run_here("eval/shape_bias.py", bundle, "--stimuli", stimuli), "cat1-house2.png", "elephant")
