"""benchmarks/quant_peers.py on a tiny network: table, rows of missing or failing peers, and reuse of results."""

import json
import sys
from dataclasses import replace

import pytest
import quant_peers
from peers import work
from peers.all_peers import PEERS
from peers.base import Peer
from peers.runtimes import ORT
from quant_peers import PeerOptions, Row, chosen, collect, death, main, markdown, run_in_process, work_options

from illama.errors import UserError


def fail(task):
    raise ValueError("it cannot\ndo this")


@pytest.fixture
def options(small_bundle, image_folder, tmp_path, monkeypatch):
    """Options for a tiny network and 18 test images; the peers run in this process."""
    monkeypatch.setenv("CI", "true")  # the command sets them permanently
    monkeypatch.setenv("NNCF_CI", "1")
    monkeypatch.setattr(quant_peers, "run_in_process", work.main)
    for name in ("fp32", "ours-int8"):
        monkeypatch.setitem(PEERS, name, replace(PEERS[name], runtimes=(ORT,)))
    monkeypatch.setitem(PEERS, "absent", Peer("Absent", fail, (ORT,), "none", (("no_such_module", "no-such-package"),)))
    monkeypatch.setitem(PEERS, "failing", Peer("Failing", fail, (ORT,), "none"))
    return PeerOptions(
        checkpoint=small_bundle,
        data=str(image_folder),
        calibration_images=8,
        rounds=1,
        threads=1,
        out=tmp_path / "out",
        results=tmp_path / "results",
    )


def test_the_table_has_results_and_failures(options, capsys):
    peers = ("ort-u8s8-products", "ours-int8", "absent", "failing")
    main(replace(options, peers=peers))
    content = json.loads((options.results / "images.json").read_text())
    rows = {row["peer"]: row for row in content["peers"]}
    assert list(rows) == ["fp32", *peers]
    for name in ("fp32", "ort-u8s8-products", "ours-int8"):
        row = rows[name]
        assert row["error"] is None and row["mb"] > 0 and row["seconds"] > 0 and 0.1 < row["peak_gib"] < 64
        assert row["p50"]["1"] > 0 and row["ratio"]["8"] > 0
    assert rows["fp32"]["ratio"]["1"] == 1 and rows["fp32"]["agreement"] == 100
    assert rows["ours-int8"]["mb"] < rows["fp32"]["mb"]
    assert rows["fp32"]["findings"] == rows["ours-int8"]["findings"] == "none"
    assert "quantized-residual" in rows["ort-u8s8-products"]["findings"]
    assert rows["absent"]["error"].startswith("not installed: no-such-package (pip install -r ")
    assert rows["failing"]["error"] == "ValueError: it cannot do this"
    table = (options.results / "images.md").read_text()
    assert "| Absent | ONNX Runtime | failed: not installed: no-such-package" in table
    assert "absent will be left out: not installed" in capsys.readouterr().err


def test_results_are_reused_and_failures_tried_again(options, monkeypatch):
    started = []

    def run(job):
        started.append(job.peer)
        result = {"error": "ValueError: no"} if job.peer == "failing" else {"file": "model.onnx", "failed": {}}
        quant_peers.write_result(job.out, result)

    monkeypatch.setattr(quant_peers, "run_in_process", run)
    options = replace(options, peers=("failing",))
    collect(options)
    collect(options)
    assert started == ["fp32", "failing", "failing"]
    collect(replace(options, again=True))
    collect(replace(options, calibration_images=4))
    assert started[3:] == ["fp32", "failing"] * 2


def test_a_process_that_dies_is_a_row(options, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    job = work_options(options, "fp32")
    job.out.mkdir(parents=True)
    run_in_process(job)
    assert "ended with status 1" in json.loads((job.out / work.RESULT).read_text())["error"]
    assert death(-9) == "its process was ended by SIGKILL, as when memory runs out"


def test_an_unknown_peer_is_named(options):
    with pytest.raises(UserError, match=r"'nobody'.*fp32, "):
        chosen(replace(options, peers=("nobody",)))


def test_a_failure_cannot_break_the_table():
    row = Row("x", "X", ORT, "settings", error="a | b")
    header, _, line = markdown([row], "title").splitlines()[2:5]
    assert line.count("|") == header.count("|") and "failed: a / b" in line
