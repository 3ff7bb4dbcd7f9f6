"""Scheme files: the shipped ones, those of users, and keys of older versions."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tyro
from support import run_command

import quant.schemes
from illama.errors import UserError
from quant.schemes.formats import TensorSpec
from quant.schemes.scheme import read_scheme, shipped_scheme, stored_scheme, write_scheme
from quant.schemes.shipped import SHIPPED_SCHEMES
from quant.search import SearchOptions


def test_every_shipped_file_is_listed_and_has_a_summary():
    files = {path.stem for path in Path(quant.schemes.__path__[0]).glob("*.yaml")}
    assert files == set(SHIPPED_SCHEMES) and len(SHIPPED_SCHEMES) == len(files)
    result = run_command("quant/list_schemes.py")
    shown = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    assert shown == [[name, shipped_scheme(name).summary] for name in SHIPPED_SCHEMES]


@pytest.mark.parametrize("name", SHIPPED_SCHEMES)
def test_a_written_scheme_is_read_back(name, tmp_path):
    scheme = replace(shipped_scheme(name), name="mine")
    write_scheme(scheme, tmp_path / "other.yaml")
    found = read_scheme(tmp_path / "other.yaml")
    assert found == scheme and list(found.tensors) == list(scheme.tensors)


def _read(text, folder):
    (folder / "mine.yaml").write_text(text)
    return read_scheme(folder / "mine.yaml")


def test_a_file_extends_its_base(tmp_path):
    scheme = _read(
        "base: int8\ntensors: {'*.fc2.input': float, '*.weight': {format: int8, calibrator: mse}}\n", tmp_path
    )
    assert scheme.name == "mine" and scheme.smooth == shipped_scheme("int8").smooth
    assert scheme.spec("blocks.0.mlp.fc2.input") is None
    assert scheme.spec("head.weight") == TensorSpec("int8", calibrator="mse")
    assert list(scheme.tensors)[-1] == "*.weight"  # the file's patterns apply, not the base's


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- int8", "mine.yaml"),
        ("tensors: [int8]", "mine.yaml"),
        ("colour: red", "colour"),
        ("base: int3", "'int3'"),
        ("tensors: {'*.weight': {format: int8, colour: red}}", "colour"),
        ("tensors: {'*.weight': int3}", "'int3'"),
        ("reconstruction_iterations: -1", "reconstruction_iterations"),
        ("rotate: {hidden: 24}", "hidden"),
        ("rotate: {seed: -1}", "seed"),
        ("rotate: {hidden: 32, hidden_blocks: -1}", "hidden_blocks"),
        ("rotate: {hidden_blocks: 1}", "hidden_blocks"),
        ("rotate: {residual: sometimes}", "residual"),
        ("rotate: {sideways: true}", "sideways"),
        ("backend: tpu", "backend"),
        ("name: A B", "'A B'"),
        ("smooth: {'*': 2}", "smooth"),
        ("learned: 1\nreconstruction_iterations: 1", "learned"),
    ],
)
def test_an_invalid_file_is_refused(text, words, tmp_path):
    with pytest.raises(UserError, match=words) as error:
        _read(text, tmp_path)
    assert "\n" not in str(error.value) and "mine.yaml" in str(error.value)


def test_the_former_name_of_reconstruction_iterations_is_read(tmp_path):
    """In scheme files, in the weights of older bundles, and on the command line; the new name is written."""
    scheme = _read("base: w4a8\nlearned: 7\n", tmp_path)
    assert scheme.reconstruction_iterations == 7
    write_scheme(scheme, tmp_path / "written.yaml")
    assert "reconstruction_iterations: 7" in (tmp_path / "written.yaml").read_text()
    values = asdict(scheme)
    values["learned"] = values.pop("reconstruction_iterations")
    assert stored_scheme(values, "it") == scheme
    options = tyro.cli(SearchOptions, args=["--max-drop", "1", "--learned", "7"])
    assert options.reconstruction_iterations == 7
