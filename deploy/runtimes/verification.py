"""Verifies engines by golden answers when they are opened, once per device and version (docs/engines.md).

The outcome is stored beside the file as ``verified.json``, or in the cache folder if the file's folder is read-only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from deploy.runtimes.engine import Engine
from illama.atomic_write import cache_folder, write_file
from illama.bundle import GOLDEN, bundle_of, sha256, size_of, with_data
from illama.errors import UserError
from illama.golden_answers import GoldenAnswers, WrongAnswerError
from illama.hardware import cpu_name
from illama.structured_files import read_json

VERIFIED = "verified.json"
_DRIVER = Path("/proc/driver/nvidia/version")  # a driver compiles kernels too
_KEPT = 20  # outcomes in a file


@dataclass(frozen=True)
class Outcome:
    """The outcome of a verification.

    Attributes:
        file: name of the file.
        bytes: its size.
        modified_ns: when it was modified, in nanoseconds since 1970.
        golden_sha256: SHA-256 of the golden answers.
        runtime: the engine's runtime, with its version and precision.
        device: the processor, and the GPU's driver.
        passed: whether the answers were right. An engine that failed is verified again at the next start.
    """

    file: str
    bytes: int
    modified_ns: int
    golden_sha256: str
    runtime: str
    device: str
    passed: bool


def verify(engine: Engine, file: Path, remember: bool = True) -> bool:
    """Verifies that an engine computes the golden answers of its file, at its smallest batch and at a large one.

    Args:
        remember: whether to rely on the stored outcome of an earlier verification, and to store this one.

    Returns:
        False if the file has no golden answers.

    Raises:
        UserError: the engine computes other logits; or the golden answers cannot be read.
    """
    path = find_golden(file)
    if path is None:
        return False
    passed = _outcome(engine, file, path, True)
    if remember and passed in _stored(file):
        return True
    golden = GoldenAnswers.read(path)
    try:
        for batch in dict.fromkeys(engine.batches):
            golden.check(engine.infer(golden.inputs(batch)), engine.arithmetic)
    except RuntimeError as error:  # of OpenVINO or PyTorch
        raise UserError(f"{file} cannot run its golden answers: {error}") from error
    except WrongAnswerError as error:
        if remember:
            _store(_outcome(engine, file, path, False), file)
        unsure = ". No GPU has confirmed this tolerance yet" if engine.arithmetic == "tensorrt" else ""
        raise UserError(
            f"{file} in {engine.runtime} {error}{unsure}: do not use it here (predict.py and serve.py run it if given "
            "--unverified)"
        ) from error
    if remember:
        _store(passed, file)
    return True


def find_golden(file: Path) -> Path | None:
    """Returns the golden answers beside a file of a bundle, or of the bundle of an engine; None if there are none."""
    beside = (file.with_name(GOLDEN), bundle_of(file) / GOLDEN)
    return next((path for path in beside if path.exists()), None)


def _outcome(engine: Engine, file: Path, golden: Path, passed: bool) -> Outcome:
    modified, digest = max(each.stat().st_mtime_ns for each in with_data(file)), sha256(golden)
    driver = _DRIVER.read_text().splitlines()[0] if _DRIVER.exists() else ""
    device = f"{cpu_name()} {driver}".strip()
    return Outcome(file.name, size_of(file), modified, digest, engine.runtime, device, passed)


def _places(file: Path) -> Iterator[Path]:
    yield file.with_name(VERIFIED)
    key = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]
    yield cache_folder() / f"verified-{key}.json"


def _stored(file: Path) -> list[Outcome]:
    """Returns all stored outcomes; those that cannot be read are as if there were none."""
    found: list[Outcome] = []
    for place in _places(file):
        try:
            found += read_json(place, tuple[Outcome, ...])
        except UserError:
            continue
    return found


def _store(outcome: Outcome, file: Path) -> None:
    """Adds an outcome to the stored ones, in the first place that can be written."""
    others = [each for each in _stored(file) if (each.file, each.runtime) != (outcome.file, outcome.runtime)]
    text = json.dumps([asdict(each) for each in (*others[1 - _KEPT :], outcome)], indent=2) + "\n"
    for place in _places(file):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with write_file(place) as draft:
                draft.write_text(text)
            return
        except OSError:  # read-only, or full
            continue
