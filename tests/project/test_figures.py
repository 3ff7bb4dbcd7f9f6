"""Figures in the documents equal the results files; results of other commands can be read."""

import json
import runpy

import pytest
import yaml
from support import ROOT, assert_one_line_error

from eval.report.store import read_results, write_results
from illama.errors import UserError

FIGURES = runpy.run_path(str(ROOT / "docs" / "figures.py"))
update, block_text, value_text = FIGURES["update"], FIGURES["block_text"], FIGURES["value_text"]
TABLES = """made here

| scheme | runs in | top-1 % |
|---|---|---|
| int8 | CPU | 92.78 |
| int8-smooth | CPU | 92.79 |

| a |
| --- |
| 1 |
"""


@pytest.fixture
def root(tmp_path):
    """A README with one block and one value, both equal to the results."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "it.md").write_text(TABLES)
    (tmp_path / "results" / "it.json").write_text(json.dumps({"rows": [{"p50 ms": 1.2345}]}))
    (tmp_path / "README.md").write_text("""# Title

<!-- figures: {file: results/it.md, table: 2} -->
| a |
| --- |
| 1 |
<!-- end -->

It took <!-- value: results/it.json rows/0/p50 ms .2f -->1.23<!-- /value --> ms.
""")
    return tmp_path


def test_figures_in_the_documents_equal_the_results(run_here):
    result = run_here("docs/figures.py", "--check")
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_changed_number_is_reported_and_corrected(root):
    text = (root / "README.md").read_text()
    assert update(root, write=False) == []
    for old, new, line in (("| 1 |", "| 2 |", 3), (">1.23<", ">1.24<", 9)):
        (root / "README.md").write_text(text.replace(old, new))
        (found,) = update(root, write=False)
        assert found.startswith(f"README.md, line {line}: differs from") and "results/it." in found
        assert new in (root / "README.md").read_text()  # not written
        assert update(root) == [found] and (root / "README.md").read_text() == text


def test_a_block_can_select_rows_and_columns(root):
    assert block_text(" results/it.md ", root) == TABLES
    assert block_text("{file: results/it.md, table: 1}", root).startswith("| scheme | runs in |")
    cut = block_text("{file: results/it.md, table: 1, rows: [int8], without: [runs in]}", root)
    assert cut == "| scheme | top-1 % |\n| --- | --- |\n| int8 | 92.78 |\n"  # and not int8-smooth
    assert value_text("results/it.json\n rows/0/p50 ms .1f", root) == "1.2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- figures: results/it.md -->\n", "line 1: <!-- figures: lacks its other half"),
        ("a\n<!-- end -->\n", "line 2: <!-- end lacks"),
        ("<!-- figures: results/it.md -->\n| 1 |<!-- value: results/it.json rows .2f -->\n<!-- end -->", "line 1"),
        ("a\n<!-- value: results/it.json rows .2f -->1<!-- /value -->", "line 2: a value must not start a line"),
        ("<!-- figures: results/no.md -->\n<!-- end -->", "cannot read results/no.md: No such file"),
        ("<!-- figures: {file: results/it.md, table: 3} -->\n<!-- end -->", "no table 3"),
        ("<!-- figures: {file: results/it.md, table: 1, rows: [fp8]} -->\n<!-- end -->", "no column or row 'fp8'"),
        ("<!-- figures: {file: results/it.md, tables: 1} -->\n<!-- end -->", "cannot read the mark"),
        ("<!-- figures: {file: results/it.md -->\n<!-- end -->", "cannot read the mark"),
        ("a <!-- value: results/it.json rows/1/p50 .2f -->1<!-- /value -->", "no value 'rows/1/p50'"),
        ("a <!-- value: results/it.md rows .2f -->1<!-- /value -->", "in results/it.md"),
    ],
)
def test_the_error_for_a_wrong_mark_is_one_line(root, text, message):
    (root / "docs").mkdir()
    (root / "docs" / "a.md").write_text(text)
    changed = (root / "README.md").read_text().replace(">1.23<", ">1.24<")
    (root / "README.md").write_text(changed)
    with pytest.raises(UserError, match=r"^docs/a.md: ") as caught:
        update(root)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert (root / "README.md").read_text() == changed


def test_commands_run_in_the_root_and_failures_are_reported(run_here, tmp_path, capfd):
    commands = {
        "good": {"minutes": 1, "run": "test -f Makefile\npython -c 'print(6 * 7)'"},
        "bad": {"minutes": 2, "run": "false\ntrue"},
    }
    assert FIGURES["run_all"](["good", "bad"], commands, tmp_path / "done.txt") == ["bad"]
    output = capfd.readouterr().out
    assert "\n42\n" in output and "[1/2] good: about 1 minutes of 3" in output
    assert_one_line_error(run_here("docs/figures.py", "--run", "ptqq"), "no commands named 'ptqq'", "robustness")


def test_an_unfinished_run_repeats_failed_commands(tmp_path, capfd):
    commands = {
        name: {"minutes": 1, "run": f"echo ran {name}; test {name} != bad -o -e {tmp_path / 'mended'}"}
        for name in ("good", "bad", "last")
    }
    done = tmp_path / "figures" / "done.txt"
    assert FIGURES["run_all"](list(commands), commands, done) == ["bad"]
    assert done.read_text().split() == ["good", "last"]
    assert FIGURES["run_all"]([], commands, done) == [] and done.exists()  # nothing to run
    (tmp_path / "mended").touch()
    capfd.readouterr()
    assert FIGURES["run_all"](list(commands), commands, done) == []
    output = capfd.readouterr().out
    assert "ran bad" in output and "ran good" not in output and "done before: good, last" in output
    assert not done.exists()  # so that the next run runs all commands
    done.write_text("good\nlast\n")
    FIGURES["run_all"](["good"], commands, done, again=["good"])
    assert "ran good" in capfd.readouterr().out


def test_every_command_names_files_that_exist():
    for name, entry in yaml.safe_load((ROOT / "docs" / "figures.yaml").read_text()).items():
        assert set(entry) <= {"minutes", "needs", "run"} and entry["minutes"] > 0, name
        for word in entry["run"].split():
            if word.endswith(".py"):
                assert (ROOT / word).is_file(), f"{name}: {word}"


def test_results_can_be_read(tmp_path, capsys):
    write_results(tmp_path, "robustness", {"models": {}}, "| a |\n| --- |\n| 1 |")
    write_results(tmp_path, "another-one", {}, "| b |")
    (tmp_path / "notes.md").write_text("no result")
    another, result = read_results(tmp_path)
    assert (another.title, another.markdown) == ("another one", "| b |\n")
    assert result.title != "robustness" and result.markdown == "| a |\n| --- |\n| 1 |\n"
    assert result.source == str(tmp_path / "robustness.md")
    assert result.command and result.machine["cores"] >= 1
    (layers,) = read_results(ROOT / "results" / "sensitivity" / "nano-int8")  # without its machine
    assert layers.title != "nano-int8" and layers.machine == {}
    (tmp_path / "robustness.json").write_text("[1]")
    with pytest.raises(UserError, match=r"robustness\.json"):
        read_results(tmp_path)
    for nothing in (tmp_path / "empty", ROOT / "docs"):
        with pytest.raises(UserError, match=nothing.name):
            read_results(nothing)
