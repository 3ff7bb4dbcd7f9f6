"""Partial work: what a command that ends early keeps, and when the next one continues with it."""

import errno
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from illama.errors import UserError
from illama.partial_work import partial_work

FACTS = {"schemes": ["int8"], "seed": 0}
PARTS = ("one", "two", "three")


def make(out, stop_at=None, error=RuntimeError, facts=FACTS, restart=False, written=None):
    """Writes three parts and a report; returns ``written`` with the names of the parts that were written."""
    written = [] if written is None else written
    with partial_work(out, lambda folder: (folder / "report.txt").exists()) as work:
        work.start(facts, restart)
        for name in PARTS:

            def write(folder, name=name):
                (folder / "engines").mkdir()
                (folder / "engines" / "model").write_text(name)
                (folder / "manifest.json").write_text(json.dumps(facts))
                if name == stop_at:
                    raise error
                written.append(name)

            work.part(name, write)
        work.step("evaluation").mkdir(parents=True, exist_ok=True)
        (work.result / "report.txt").write_text("three parts")
        if stop_at == "report":
            raise error
    return written


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def out(tmp_path):
    """A run that stopped after two parts."""
    with pytest.raises(RuntimeError):
        make(tmp_path / "out", "three")
    return tmp_path / "out"


@pytest.fixture
def partial(out):
    return out.with_name("out.partial")


@given(stops=st.lists(st.sampled_from([*PARTS, "report"]), max_size=5), earlier=st.booleans())
@settings(deadline=None, max_examples=25)
def test_each_part_is_finished_once_however_often_the_run_stops(tmp_path_factory, stops, earlier):
    place, written = tmp_path_factory.mktemp("runs"), []
    make(place / "whole")
    if earlier:
        (place / "out").mkdir()
        (place / "out" / "report.txt").write_text("earlier")
    before = contents(place / "out")
    for stop_at in stops:
        if stop_at not in written:
            with pytest.raises(RuntimeError):
                make(place / "out", stop_at, written=written)
            assert contents(place / "out") == before
            assert (place / "out.partial").exists() == bool(written)
    make(place / "out", written=written)
    assert tuple(written) == PARTS
    assert contents(place / "out") == contents(place / "whole")
    assert sorted(path.name for path in place.iterdir()) == ["out", "whole"]


def test_other_facts_are_refused_by_name_or_restart(out, partial):
    kept = contents(partial)
    with pytest.raises(UserError, match=r"out\.partial.* seed.*--restart") as error:
        make(out, facts={**FACTS, "seed": 1})
    assert "schemes" not in str(error.value)
    assert contents(partial) == kept
    assert make(out, facts={**FACTS, "seed": 1}, restart=True) == [*PARTS]
    assert json.loads((out / "one" / "manifest.json").read_text())["seed"] == 1
    assert not partial.exists()


@pytest.mark.parametrize("path", ["result/one/manifest.json", "result/one/engines/model", "one.sha256"])
@pytest.mark.parametrize("content", [None, b"", b"\xff other"])
def test_a_damaged_part_is_written_again(out, partial, path, content):
    expected = contents(partial / "result" / "one")
    (partial / path).unlink()
    if content is not None:
        (partial / path).write_bytes(content)
    assert make(out) == ["one", "three"]
    assert contents(out / "one") == expected


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b'{"seed": 0'])
def test_a_damaged_list_of_options_is_an_error(out, partial, content):
    (partial / "run.json").write_bytes(content)
    with pytest.raises(UserError, match=r"run\.json"):
        make(out)
    assert make(out, restart=True) == [*PARTS]


def test_leftovers_of_a_killed_run_are_removed(out, partial):
    for folder in (partial, partial / "result", partial / "result" / "one"):
        (folder / ".one.draft-0123456789abcdef").mkdir()
        (folder / ".one.draft-0123456789abcdef.lock").touch()
    make(out)
    assert not list(out.rglob(".*")) and not partial.exists()


def test_a_run_without_a_finished_part_binds_nobody(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "run.json").write_text('{"seed": 5}')
    with pytest.raises(RuntimeError):
        make(out, "one")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["run.json", "notes.txt"])
def test_other_files_are_left_alone(tmp_path, name):
    for file in {name, "result"}:
        (tmp_path / "out.partial").mkdir(exist_ok=True)
        (tmp_path / "out.partial" / file).write_text("{}")
    (tmp_path / "out.partial" / "thesis.doc").write_text("mine")
    before = contents(tmp_path)
    for restart in (False, True):
        with pytest.raises(UserError, match=r"out\.partial holds other files"):
            make(tmp_path / "out", restart=restart)
    assert contents(tmp_path) == before


def test_ctrl_c_says_how_to_continue(out, partial):
    with pytest.raises(KeyboardInterrupt, match=r"again.*out\.partial"):
        make(out, "report", KeyboardInterrupt)
    assert make(out) == []


def test_a_full_disk_keeps_finished_parts(out):
    with pytest.raises(OSError, match="No space"):
        make(out, "three", OSError(errno.ENOSPC, "No space"))
    assert make(out) == ["three"]


def test_one_process_at_a_time(out, partial):
    with partial_work(out), pytest.raises(UserError, match=r"out\.partial.*in use"):
        make(out)
    kept = contents(partial)
    assert kept and ".lock" not in kept
