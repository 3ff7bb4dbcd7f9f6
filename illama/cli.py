"""Runs a command: parses its options and reports errors. Imports no large library, so that ``--help`` is fast."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from functools import cache, partial
from itertools import takewhile
from types import NoneType, TracebackType
from typing import Annotated, Any, Literal, TypedDict, TypeVar, get_args, get_origin, get_type_hints

import docstring_parser
import tyro

import illama.bundle
from illama.bundle import SHIPPED
from illama.errors import UserError, check_packages
from illama.options import check_bounds, check_names
from illama.quiet import without_noise

_OWN = ("illama", "quant", "deploy", "eval")
_EXTRAS = {  # module -> the extra of pyproject.toml that installs it, if it is not quantize
    "onnxruntime": "runtime",
    "openvino": "openvino",
    "tensorrt_rtx": "rtx",
    "tensorboard": "train",
    "tritonclient": "serve",
    "segmentation_models_pytorch": "segmentation",
    "imagecorruptions": "robustness",
}
_INTERRUPTED = "interrupted; no incomplete file was left behind"
Options = TypeVar("Options")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EBUSY, errno.EXDEV)
_BAD_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY, errno.EISDIR)
_NO_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc")  # in PyTorch's and the runtimes' messages


def run_command(
    options: type[Options], main: Callable[[Options], None], parse: Callable[[], Options] | None = None
) -> None:
    """Parses the command line into ``options``, runs ``main``, and reports the user's errors in one line.

    Exits with status 2 for a user's error (bad option, bad file, full disk) and 130 for Ctrl-C or SIGTERM. Any other
    exception is a defect of this project and keeps its traceback.

    Args:
        parse: returns the options of the command line. Defaults to ``tyro.cli(options)``.
    """
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM cleans up like Ctrl-C
        with without_noise():
            _show_readable_defaults(options)  # type: ignore[arg-type]
            given = _in_one_line(
                parse or partial(tyro.cli, options, prog=illama.bundle.program, description=_description(options))
            )
            check_bounds(given)
            check_names(given)
            main(given)
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush at exit
    except KeyboardInterrupt as stop:
        _exit(str(stop) or _INTERRUPTED, 130)
    except Exception as error:
        if (message := _problem(error)) is None:
            raise
        _exit(message, 2)


def _examples() -> list[str]:
    """Returns the command lines in the docstring of the command, as ``illama`` takes them if it runs the command."""
    text = sys.modules["__main__"].__doc__ or ""
    lines = [line for line in text.splitlines() if line.startswith(("python ", "torchrun "))]
    if illama.bundle.program is None:
        return lines
    own = {"python": illama.bundle.program, "torchrun": rf"\1--no-python {illama.bundle.program}"}
    return [re.sub(r"^(?:python |(torchrun .*?))\S+\.py", own[line.split()[0]], line) for line in lines]


def _description(options: type[Any]) -> str:
    """Returns what ``--help`` says before the options: what the command does, and examples."""
    parsed = docstring_parser.parse(options.__doc__ or "")
    about = illama.bundle.as_run("\n\n".join(filter(None, (parsed.short_description, parsed.long_description))))
    return "\n".join([about, "", "Examples:", *(f"  {line}" for line in _examples())])


@cache
def _show_readable_defaults(options: type[Any]) -> None:
    """Makes ``--help`` show the defaults of an options dataclass, and of those within it, as a person reads them."""
    for each in options.__mro__:
        helps = option_helps(each)
        for name, hint in get_type_hints(each, include_extras=True).items() if dataclasses.is_dataclass(each) else ():
            kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
            if dataclasses.is_dataclass(kind):
                _show_readable_defaults(kind)  # type: ignore[arg-type]
            elif name in vars(each).get("__annotations__", {}):
                each.__annotations__[name] = _shown(hint, helps.get(name), _readable)


def _shown(hint: Any, documented: str | None, default: str | Callable[[str], str]) -> Any:
    """Returns the type of an option with its help text: its type's own, such as the forms of ``--data``, if any."""
    about = next(filter(None, (getattr(each, "help", None) for each in get_args(hint)[1:])), documented)
    return Annotated[hint, tyro.conf.arg(help=about, help_behavior_hint=default, metavar=_value_name(hint))]


def _value_name(hint: Any) -> str | None:
    """Returns what ``--help`` calls the value of an option that may be left out or repeated; None: tyro chooses."""
    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    kinds = [each for each in get_args(plain) if each not in (NoneType, Ellipsis)]
    if not {NoneType, Ellipsis} & set(get_args(plain)) or len(kinds) != 1:
        return None
    kind = get_args(kinds[0])[0] if get_origin(kinds[0]) is Annotated else kinds[0]
    name = f"{{{','.join(map(str, get_args(kind)))}}}" if get_origin(kind) is Literal else kind.__name__.upper()
    return f"{name} ..." if Ellipsis in get_args(plain) else name


def _readable(default: Any) -> str:
    """Returns the hint about a default, or about tyro's text for it."""
    default = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    if default in ("None", "", "''"):  # the help text says what happens without a value
        return ""
    text = {"True": "yes", "False": "no", str(SHIPPED): "the shipped nano"}.get(default, default)
    return f"(default: {text})"


def _in_one_line(parse: Callable[[], Options]) -> Options:
    """Parses the command line; raises UserError with the problem that tyro prints in a box of several lines."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return parse()
    except SystemExit as end:
        if end.code:
            lines = [line.strip("│╭╮╰╯─ ") for line in box.getvalue().splitlines()[1:]]  # the first is a title
            raise UserError(f"{_in_plain_words(lines)}: see --help") from end
        raise


def _in_plain_words(lines: list[str]) -> str:
    """Returns the first problem of tyro's box, of which an empty line ends the text."""
    problem = list(takewhile(bool, lines))
    text = " ".join(problem).rstrip(".")
    if unknown := re.match(r"Unrecognized options: .*?(--[^\s,]+)", text):
        near = next((line.split()[0] for line in lines[len(problem) :] if line.startswith("--")), "")
        return f"there is no option {unknown[1]}" + (f", perhaps {near}" if near else "")
    text = text.removeprefix("Error parsing ").replace("invalid literal for int() with base 10", "not a whole number")
    text = text.replace("could not convert string to float", "not a number")
    text = re.sub(r"no type matching \{None\}\|(\S+) could be instantiated from \['(.*)'\]", r"not a \1: \2", text)
    return re.sub(r"Expected one of \((.*)\)$", lambda found: f"expected one of {_names(found[1])}", text)


def _names(choices: str) -> str:
    """Returns the names in tyro's list of an option's choices, in order; None stands for leaving the option out."""
    return ", ".join(sorted(set(re.findall(r"[^\s',]+", choices)) - {"None"}))


def _problem(error: Exception) -> str | None:
    """Returns one line about an error that the user can correct; None for a defect of this project."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and (name := (error.name or "").split(".")[0]) not in _OWN:
        extra = _EXTRAS.get(name, "quantize")
        return f"{name} is not installed here: pip install 'illama-toolkit[{extra}]', or [all] for every command"
    if isinstance(error, OSError) and error.errno in (*_DISK_FULL, *_NOT_WRITABLE, *_BAD_PATH):
        return str(UserError(f"cannot use {error.filename or 'the output folder'}: {os.strerror(error.errno)}"))
    if "embedded null byte" in str(error) or "Symlink loop" in str(error):  # of pathlib
        return str(UserError(f"a path cannot be used: {error}"))
    if isinstance(error, MemoryError) or any(text in str(error) for text in _NO_MEMORY):
        return "not enough memory: choose smaller sizes, or a machine with more"
    return None


def _report_interrupt(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Reports Ctrl-C before :func:`run_command`, while a command imports its modules, in one line too.

    Python then ends the process by SIGINT, which is status 130 for a shell.
    """
    if issubclass(kind, KeyboardInterrupt):
        print(_INTERRUPTED, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _exit(message: str, status: int) -> None:
    message = illama.bundle.as_run(message)
    print(f"error: {message}" if status == 2 else message, file=sys.stderr)
    sys.exit(status)


sys.excepthook = _report_interrupt
try:
    check_packages()
except UserError as error:
    _exit(str(error), 2)


def given_options(options: type[Any], defaults: Any) -> dict[str, Any]:
    """Returns only the options that the command line gives: field -> value.

    For commands that read their defaults from a file, whose path is itself an option.

    Args:
        options: a dataclass; it is not instantiated.
        defaults: an instance of it, whose values ``--help`` shows as the defaults.
    """
    hints = get_type_hints(options, include_extras=True)
    fields = {
        name: _shown(hints[name], about, _readable(getattr(defaults, name)))
        for name, about in option_helps(options).items()
    }
    named = TypedDict(options.__name__, fields, total=False)  # type: ignore[operator, misc]
    named.__doc__ = options.__doc__
    return dict(tyro.cli(named, prog=illama.bundle.program, description=_description(options)))


def option_helps(options: type[Any]) -> dict[str, str]:
    """Returns field -> help text of an options dataclass, from ``Attributes`` in its and its bases' docstrings."""
    found = {}
    for each in reversed(options.__mro__):
        for entry in docstring_parser.parse(each.__doc__ or "").params:
            found[entry.arg_name] = illama.bundle.as_run(" ".join((entry.description or "").split()))
    return found
