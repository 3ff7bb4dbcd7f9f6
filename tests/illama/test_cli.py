"""Options are checked before the work, and errors that the user can correct end in one line."""

import errno
import signal
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from support import ROOT

from illama.cli import run_command
from illama.errors import UserError
from illama.options import Count, Flat, Fraction, Seed, Threads, check_bounds


@dataclass(frozen=True)
class Inner:
    """Inner options.

    Attributes:
        seed: a seed.
    """

    seed: Seed = 0


@dataclass(frozen=True)
class Options:
    """Options.

    Attributes:
        inner: others.
        threads: threads.
        sizes: sizes.
        share: a share.
    """

    inner: Flat[Inner] = field(default_factory=Inner)
    threads: Threads | None = None
    sizes: tuple[Count, ...] = (1, 2)
    share: Fraction = 0.5


@pytest.mark.parametrize(
    ("changed", "option"),
    [
        ({"inner": Inner(2**64)}, "--seed"),
        ({"inner": Inner(-1)}, "--seed"),
        ({"threads": 0}, "--threads"),
        ({"threads": 10**9}, "--threads"),
        ({"sizes": (1, 10**30)}, "--sizes"),
        ({"share": float("nan")}, "--share"),
        ({"share": -0.1}, "--share"),
    ],
)
def test_a_value_outside_the_bounds_of_its_type_is_refused(changed, option):
    check_bounds(Options())
    with pytest.raises(UserError, match=option):
        check_bounds(Options(**changed))


@pytest.mark.parametrize(
    "arguments",
    [
        ("quant/ptq.py", "--threads", "0"),
        ("quant/ptq.py", "--calibration-images", "0"),
        ("illama/train.py", "--seed", "18446744073709551616"),
        ("eval/tradeoff.py", "x", "--batches", "99999999999999999999"),
        ("eval/accuracy.py", "x", "--images", "-1"),
        ("eval/robustness.py", "x", "--workers", "-3"),
        ("illama/convert.py", "x", "--out", "y", "--image-size", "1000000000"),
        ("quant/ptq.py", "--seed", "1e23"),
        ("quant/ptq.py", "--exif", "maybe"),
        ("illama/train.py", "--epochs", "x"),
        ("eval/roofline.py", "x", "--nonsense", "3"),
        ("deploy/predict.py", "--runtime", "x') is not one of ('y'"),
        ("eval/tradeoff.py", "x", "--max-drop", "['"),
    ],
)
def test_commands_refuse_bad_options_before_the_work(arguments, run_here):
    result = run_here(*arguments)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and arguments[-2] in line


def _raise(error):
    raise error


@pytest.mark.parametrize(
    "act",
    [
        lambda: _raise(MemoryError()),
        lambda: torch.empty(1 << 60),
        lambda: open("a\0b"),  # noqa: PTH123, SIM115
        lambda: _raise(OSError(errno.ENAMETOOLONG, "", "n" * 5000)),
        lambda: _raise(OSError(errno.ELOOP, "", "a\nb")),
        lambda: _raise(OSError(errno.ENOTEMPTY, "", "a")),
    ],
    ids=["memory", "torch", "NUL", "long", "loop", "not empty"],
)
def test_errors_of_the_machine_end_in_one_line(act, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["a"])
    with pytest.raises(SystemExit) as end:
        run_command(Options, lambda _: act())
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and line.startswith("error: ") and len(line) <= 310


def test_a_reader_that_ends_is_no_error():
    code = "from illama.cli import run_command as r; from dataclasses import make_dataclass as m\n"
    code += "r(m('O', []), lambda _: [print('x' * 1000) for _ in range(1000)])"
    command = ["sh", "-c", f'{sys.executable} -c "$1" | true', "sh", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr


def test_ctrl_c_while_modules_are_imported_is_one_line():
    code = "import illama.cli, os, signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert len(result.stderr.strip().splitlines()) == 1 and result.returncode in (130, -signal.SIGINT)
