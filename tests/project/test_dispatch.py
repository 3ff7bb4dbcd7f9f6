"""The ``illama`` command: every command has a name, and is the same as its file."""

import subprocess
import sys

import pytest
from project_files import ROOT, commands, module_name
from support import assert_one_line_error

from illama.dispatch import COMMANDS
from illama.manifest import Manifest


def _illama(*arguments, timeout=120):
    code = "import sys; sys.argv[0] = 'illama'; from illama.dispatch import main; main()"
    line = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def test_every_command_has_a_name():
    assert sorted(COMMANDS.values()) == sorted(module_name(path) for path in commands())


def test_the_overview_fits_a_screen_and_names_every_command():
    result = _illama()
    assert result.returncode == 0 and _illama("--help").stdout == result.stdout
    assert len(result.stdout.splitlines()) <= 40 and all(len(line) < 120 for line in result.stdout.splitlines())
    assert all(f"\n  {name} " in result.stdout for name in COMMANDS)
    assert _illama("--version").stdout.startswith("illama ")


def test_a_command_is_the_same_as_its_file():
    by_name = _illama("schemes")
    by_file = subprocess.run([sys.executable, "quant/list_schemes.py"], cwd=ROOT, capture_output=True, text=True)
    assert (by_name.returncode, by_name.stdout) == (by_file.returncode, by_file.stdout)
    assert "usage: illama predict" in _illama("predict", "--help").stdout
    assert_one_line_error(_illama("predict"), "images")
    assert_one_line_error(_illama("build"), "illama build")  # and not its file, which only a clone has


@pytest.mark.parametrize(("name", "near"), [("quantise", "quantize"), ("xyz", "--help"), ("ptq.py", "")])
def test_an_unknown_command_is_one_line(name, near):
    assert_one_line_error(_illama(name), near)


def test_a_bundle_says_which_command_wrote_it(small_bundle, image_folder, tmp_path):
    out = tmp_path / "a b"
    options = ("--checkpoint", small_bundle, "--data", image_folder, "--schemes", "int8", "--calibration-images", 8)
    result = _illama("quantize", *options, "--no-report", "--no-engines", "--out", out)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in out.iterdir()] == ["int8"]
    assert Manifest.read(out / "int8").provenance.command.startswith("illama quantize --checkpoint ")
    assert str(out / "int8") in result.stdout and "model.onnx" in result.stdout
