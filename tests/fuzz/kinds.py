"""The kinds of input: an intact file of each, how it is mutated, and who reads it."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import random
import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mutations as m
import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from project_files import commands, module_name
from sample_report import make_report
from support import ROOT, SMALL, write_bundle, write_format_1, write_images, write_made_up_engine

from deploy.runtimes.open_engine import open_engine
from deploy.runtimes.temperature import read_temperature, store_temperature
from deploy.serving.known_answer import KnownAnswer
from deploy.trt.record import EngineRecord, record_path
from eval.report.regression import Baseline
from illama import cli
from illama.bundle import GOLDEN, MANIFEST, TEMPERATURE
from illama.checkpoints.conversion import class_names
from illama.checkpoints.load import load_checkpoint, load_network, write_weights
from illama.data.datasets import open_data
from illama.data.idx_files import read_idx_pair
from illama.data.images import decode_image
from illama.data.preprocessing import Preprocessing
from illama.golden_answers import GoldenAnswers, WrongAnswerError
from illama.manifest import Manifest
from illama.partial_work import RUN, claim
from illama.training.recipe import RECIPES, load_recipe
from quant.export.golden import golden_answers
from quant.export.onnx_export import export_onnx
from quant.export.weights import read_quantized_weights, write_quantized_weights
from quant.quantizers.calibrate import calibrate
from quant.quantizers.torchao_backend import quantize_with_torchao, write_torchao
from quant.schemes.scheme import read_scheme, resolve, shipped_scheme
from quant.schemes.shipped import shipped_path

TINY = replace(SMALL, depth=1)
IMAGES = np.zeros((1, 3, TINY.image_size, TINY.image_size), np.float32)


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        name: kind of file; several entries may share one.
        file: intact file, which a mutation replaces.
        mutate: mutations, one of which is drawn.
        read: reads the file; it checks the value, raises UserError, or fails.
    """

    name: str
    file: Path
    mutate: Sequence[m.Mutation]
    read: Callable[[], None]


def make_kinds(folder: Path) -> list[Kind]:
    """Writes an intact file of each kind below ``folder``."""
    return [
        *_structured(folder),
        *_tensors(folder),
        *_data(folder),
        Kind("options", _touch(folder / "none"), (), _pass),
    ]


def _structured(folder: Path) -> list[Kind]:
    bundle, old = write_bundle(folder / "bundle", TINY), write_bundle(folder / "old", TINY)
    write_format_1(old)
    engine = bundle / "engines" / "tiny" / "model.engine"
    write_made_up_engine(engine)
    store_temperature(bundle / "model.safetensors", 1.5, 100, "data", "test")
    answer = KnownAnswer(b"hi", [0, 1], [0.5, 1.5], 0.2, 0.1)
    answer.write(folder / "known_answer.json")
    claim(folder / "run", {"a": {"b": [1, 2]}, "images": 3})
    report = folder / "report.json"
    report.write_text(json.dumps(make_report().to_json()))
    scheme, recipe = folder / "scheme.yaml", folder / "recipe.yaml"
    scheme.write_text(shipped_path("mixed").read_text())
    recipe.write_text((RECIPES / "in1k-tiny.yaml").read_text())
    plain = (m.json_tree, m.json_tree, m.raw)
    text = (m.yaml_tree, m.yaml_tokens, m.yaml_tokens, m.raw)
    return [
        Kind("manifest.json", bundle / MANIFEST, plain, partial(_manifest, bundle)),
        Kind("manifest.json", old / MANIFEST, plain, partial(_manifest, old)),
        Kind("record.json", record_path(engine), plain, lambda: _is(EngineRecord.read(engine), EngineRecord)),
        Kind("known_answer.json", folder / "known_answer.json", plain, partial(_known_answer, folder)),
        Kind("temperature.json", bundle / TEMPERATURE, plain, partial(_temperature, bundle)),
        Kind("run.json", folder / "run" / RUN, plain, lambda: claim(folder / "run", {"a": {"b": [1, 2]}, "images": 3})),
        Kind("report.json", report, plain, lambda: _report(report)),
        Kind("scheme.yaml", scheme, text, partial(_scheme, scheme)),
        Kind("recipe.yaml", recipe, text, lambda: _is(load_recipe(str(recipe)).epochs, int)),
    ]


def _tensors(folder: Path) -> list[Kind]:
    model = load_checkpoint(folder / "bundle").model
    ours, bare, pickled = folder / "ours.safetensors", folder / "bare.safetensors", folder / "released.pth"
    write_weights(model.state_dict(), model.config, ours)
    torch.save({"model": model.state_dict(), "epoch": 3}, pickled)
    legacy = folder / "legacy.pth"
    torch.save(model.state_dict(), legacy, _use_new_zipfile_serialization=False)
    from safetensors.torch import save_file

    save_file(model.state_dict(), bare)
    scheme = shipped_scheme("int8")
    quantized = calibrate(model, resolve(scheme, model), [torch.rand(2, 3, 32, 32)])
    write_quantized_weights(quantized, scheme, folder / "quantized.safetensors")
    torchao = write_torchao(
        quantize_with_torchao(model, resolve(shipped_scheme("int8-weight-only-torchao"), model)), folder / "bundle"
    )
    export_onnx(model, folder / "model.onnx", "plain")
    golden_answers(model, Preprocessing.imagenet(32), [], False).write(folder / "run")
    golden = folder / "run" / GOLDEN  # a folder without the files that it would verify
    tensors, zipped = (m.safetensors_header, m.safetensors_header, m.in_front(0.05), m.raw), m.zipped(m.raw)
    return [
        Kind("golden.safetensors", golden, tensors, partial(_golden, golden)),
        Kind("safetensors", ours, tensors, partial(_checkpoint, ours)),
        Kind("safetensors", bare, tensors, partial(_checkpoint, bare)),
        Kind("safetensors", torchao, tensors, partial(_network, torchao)),
        Kind(
            "safetensors",
            folder / "quantized.safetensors",
            tensors,
            lambda: _run(read_quantized_weights(folder / "quantized.safetensors", model)[0]),
        ),
        Kind("pth", pickled, (zipped, zipped, m.raw), partial(_checkpoint, pickled)),
        Kind("pth", legacy, (m.in_front(0.05), m.raw), partial(_checkpoint, legacy)),
        Kind("onnx", folder / "model.onnx", (onnx_graph, onnx_graph, m.raw), partial(_onnx, folder / "model.onnx")),
    ]


def _data(folder: Path) -> list[Kind]:
    import gzip

    idx = folder / "idx"
    idx.mkdir()
    for name, shape in (("images-idx3", (6, 5, 4)), ("labels-idx1", (6,))):
        head = b"\0\0\x08" + bytes([len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
        (idx / f"t-{name}-ubyte.gz").write_bytes(
            gzip.compress(head + bytes(np.arange(np.prod(shape), dtype=np.uint8) % 6))
        )
    shards, table = folder / "shards", folder / "parquet"
    for each in (shards, table):
        each.mkdir()
    pictures = [_encode(number) for number in range(12)]
    for split in ("train", "val"):
        with tarfile.open(shards / f"{split}-0000.tar", "w") as tar:
            for number, picture in enumerate(pictures):
                for suffix, data in (("png", picture), ("cls", str(number % 3).encode())):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        rows = pa.table({"image": [{"bytes": p, "path": "x"} for p in pictures], "label": [n % 3 for n in range(12)]})
        names = {"info": {"features": {"label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}}}
        pq.write_table(rows.replace_schema_metadata({"huggingface": json.dumps(names)}), table / f"{split}-0.parquet")
    (shards / "classes.txt").write_text("red\ngreen\nblue\n")
    kinds = [
        Kind(
            "idx",
            path,
            (m.raw, m.gzipped(m.in_front(0.1)), m.gzipped(m.raw)),
            lambda: _is(read_idx_pair(idx, "t", 10)[0], np.ndarray),
        )
        for path in sorted(idx.iterdir())
    ]
    for split in ("train", "val"):
        tar, parquet = shards / f"{split}-0000.tar", table / f"{split}-0.parquet"
        kinds.append(Kind("tar", tar, (m.tar_members, m.tar_members, m.raw), partial(_images, f"webdataset:{shards}")))
        kinds.append(
            Kind("parquet", parquet, (parquet_table, parquet_end, m.raw), partial(_images, f"parquet:{table}"))
        )
    kinds.append(Kind("classes.txt", shards / "classes.txt", (m.lines, m.raw), partial(_classes, folder, shards)))
    write_images(folder / "images", train=2, val=2)
    for suffix in ("png", "jpg", "webp", "bmp", "tif", "ppm", "gif"):
        path = folder / "images" / "val" / "class0" / f"a.{suffix}"
        Image.fromarray(np.arange(40 * 48 * 3, dtype=np.uint8).reshape(40, 48, 3)).save(path)
        kinds.append(Kind("image", path, (m.raw, m.in_front(0.1)), partial(_image, path)))
    return kinds


def _encode(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((9, 9, 3), number, np.uint8)).save(file, "PNG")
    return file.getvalue()


def _touch(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def _pass() -> None:
    """Options have no file."""


def _is(value: Any, kind: type) -> None:
    assert isinstance(value, kind)


def _manifest(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    _is(manifest, Manifest)
    load_checkpoint(bundle)


def _known_answer(folder: Path) -> None:
    answer = KnownAnswer.read(folder / "known_answer.json")
    answer.matches(np.zeros(2))


def _golden(path: Path) -> None:
    answers = GoldenAnswers.read(path)
    assert np.isfinite(answers.inputs(2)).all()
    with contextlib.suppress(WrongAnswerError):
        answers.check(np.zeros((2, 3), np.float32), "float32")


def _report(path: Path) -> None:
    assert Baseline.read(path).rows


def _temperature(bundle: Path) -> None:
    value = read_temperature(bundle / "model.safetensors")
    assert value is None or 0 < value < float("inf")


def _scheme(path: Path) -> None:
    resolve(read_scheme(path), load_checkpoint(path.parent / "bundle").model)


def _checkpoint(path: Path) -> None:
    _run(load_checkpoint(path).model)


def _network(path: Path) -> None:
    _run(load_network(path))


def _run(model: torch.nn.Module) -> None:
    config = model.config
    with torch.inference_mode():
        logits = model(torch.zeros(1, config.in_channels, config.image_size, config.image_size))
    assert logits.shape == (1, config.num_classes)


def _onnx(path: Path) -> None:
    engine = open_engine(path, "onnxruntime")
    engine.infer(IMAGES)


def _images(spec: str) -> None:
    data = open_data(spec)
    training, validation = data.training()
    for split in (data.test(), training, validation):
        for index in range(len(split)):  # type: ignore[arg-type]
            _, label = split[index]
            assert 0 <= label < len(data.classes)


def _classes(folder: Path, shards: Path) -> None:
    class_names(shards / "classes.txt", load_checkpoint(folder / "bundle"))
    _images(f"webdataset:{shards}")


def _image(path: Path) -> None:
    assert decode_image(str(path), lambda: str(path)).mode == "RGB"


def onnx_graph(draw: random.Random, content: bytes) -> bytes:
    """Changes nodes, names, attributes, constants or shapes of a graph."""
    model = onnx.load_from_string(content)
    graph, kind = model.graph, draw.randrange(10)
    node, constant = draw.choice(graph.node), draw.choice(graph.initializer)
    names = (
        [name for each in graph.node for name in each.output] + [each.name for each in graph.initializer] + ["", "x"]
    )
    if kind == 0:
        del node.output[:]
    elif kind == 1 and node.input:
        node.input[draw.randrange(len(node.input))] = draw.choice(names)
    elif kind == 2:
        node.op_type = draw.choice((*(each.op_type for each in graph.node), "Nothing", "", "Loop"))
    elif kind == 3:
        constant.dims[:] = draw.choice(([], [2**40], [-1], [0], [3, 3]))
    elif kind == 4:
        constant.data_type = draw.choice((0, 1, 3, 7, 10, 17, 22, 99))
    elif kind == 5:
        constant.data_location = onnx.TensorProto.EXTERNAL
        entry = constant.external_data.add()
        entry.key, entry.value = "location", draw.choice(("../../../etc/passwd", "missing", "/dev/zero", "", "."))
    elif kind == 6:
        node.output[0] = draw.choice(names)
    elif kind == 9:
        shape = onnx.numpy_helper.from_array(np.array(draw.choice(([2**40], [2**20, 2**20]))), "shape")
        graph.initializer.append(shape)
        graph.node.append(onnx.helper.make_node(draw.choice(("Identity", "Mul", "Neg")), ["shape"] * 2, ["size"]))
        graph.node.append(onnx.helper.make_node("ConstantOfShape", [draw.choice(("shape", "size"))], ["huge"]))
    elif kind == 7 and node.attribute:
        attribute = draw.choice(node.attribute)
        attribute.i, attribute.type = draw.choice((-1, 2**62, 0)), draw.choice((attribute.type, 2, 7))
    else:
        del (graph.output if draw.random() < 0.5 else graph.input)[:]
    return model.SerializeToString()


def parquet_end(draw: random.Random, content: bytes) -> bytes:
    """Changes the footer."""
    at = max(0, len(content) - 1500)
    return content[:at] + m.raw(draw, content[at:])


def parquet_table(draw: random.Random, content: bytes) -> bytes:
    """Changes columns, their types, or the metadata that the datasets library writes."""
    table = pq.read_table(io.BytesIO(content))
    count, metadata = len(table), dict(table.schema.metadata)
    label: list[Any] = table.column("label").to_pylist()
    image: list[Any] = table.column("image").to_pylist()
    kind = draw.randrange(5)
    if kind == 0:
        label[draw.randrange(count)] = draw.choice((None, -1, 3, 999_999_999, 2**40, -(2**63)))
    elif kind == 1:
        label = draw.choice((["a"] * count, [0.5] * count, [True] * count, [[1]] * count, [None] * count))
    elif kind == 2:
        image[draw.randrange(count)] = draw.choice(
            (None, {"bytes": None, "path": "x"}, {"bytes": b"", "path": None}, {"bytes": b"x" * 100, "path": "x"})
        )
    elif kind == 3:
        image = draw.choice(
            ([{"bytes": "text"}] * count, [b"x"] * count, [{"path": "x"}] * count, [{"bytes": 3}] * count)
        )
    else:
        text = metadata[b"huggingface"]
        metadata[b"huggingface"] = draw.choice((m.json_tree, m.raw))(draw, text)
    result = io.BytesIO()
    changed = pa.table({"image": image, "label": label}).replace_schema_metadata(metadata)
    if draw.random() < 0.1:
        changed = changed.rename_columns(
            [draw.choice(("image", "label", "", "a\nb", "img")), draw.choice(("label", "x"))]
        )
    pq.write_table(changed, result, row_group_size=draw.choice((1, 5, 100)), compression=draw.choice(("none", "zstd")))
    return result.getvalue()


VALUES = (
    *(
        "-1",
        "0",
        "1",
        "1e23",
        "99999999999999999999",
        "-0",
        "nan",
        "inf",
        "-inf",
        "1e309",
        "x",
        "",
        "1.5",
        "0x10",
        "\u0661",
    ),
    *("4294967296", "2147483648", "1000000000", "True", "None", "a\nb", "é" * 300, "x" * 5000, "/dev/null", "--help-x"),
)


def options_command(draw: random.Random) -> tuple[list[str], Callable[[], None]]:
    """Returns a command line with one to three nasty options, and a function that parses and checks it."""
    path = draw.choice(commands())
    name = re.search(r"\brun_command\((\w+)", path.read_text())[1]  # type: ignore[index]
    module = importlib.import_module(module_name(path))
    options = getattr(module, name)
    names = [f"--{each.replace('_', '-')}" for each in _option_names(options)]
    words = [
        word for _ in range(draw.choice((1, 1, 2, 3))) for word in (draw.choice(names or ["--x"]), draw.choice(VALUES))
    ]
    positional = ["some/bundle"] * draw.choice((0, 1, 1))
    arguments = [str(path.relative_to(ROOT)), *positional, *words]
    return arguments, partial(_parse, arguments, module, options, path)


def _option_names(options: type) -> list[str]:
    import dataclasses
    from typing import get_type_hints

    found = []
    for field, hint in get_type_hints(options).items():
        found += _option_names(hint) if dataclasses.is_dataclass(hint) else [field]
    return found


def _parse(arguments: list[str], module: Any, options: type, path: Path) -> None:
    """Runs a command up to its main function. A wrong option must end it with status 2."""
    import sys

    from illama.errors import UserError

    sys.argv = arguments
    call = re.search(r"run_command\(\w+, main, (partial\(.*\))\)", path.read_text())
    parse = eval(call[1], vars(module)) if call else None
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            cli.run_command(options, _checked, parse)
    except SystemExit as end:
        assert end.code in (0, 2), end.code
        if end.code == 2:
            (line,) = errors.getvalue().splitlines()
            raise UserError(line) from end


def _checked(options: Any) -> None:
    from illama.options import check_bounds

    check_bounds(options)
