"""Verifies engines by golden answers when they are opened, once per device and version (docs/engines.md).

The outcome is stored beside the file as ``verified.json``, or in the cache folder if the file's folder is read-only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deploy.runtimes.engine import Engine
from deploy.runtimes.kept_facts import keep_fact, kept_facts, stamp
from illama.bundle import GOLDEN, bundle_of, sha256
from illama.errors import UserError
from illama.golden_answers import GoldenAnswers, WrongAnswerError
from illama.hardware import cpu_name

VERIFIED = "verified.json"
_DRIVER = Path("/proc/driver/nvidia/version")  # a driver compiles kernels too


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
    if remember and passed in kept_facts(file, VERIFIED, Outcome):
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
    digest = sha256(golden)
    driver = _DRIVER.read_text().splitlines()[0] if _DRIVER.exists() else ""
    device = f"{cpu_name()} {driver}".strip()
    return Outcome(*stamp(file), digest, engine.runtime, device, passed)


def _store(outcome: Outcome, file: Path) -> None:
    keep_fact(file, VERIFIED, outcome, lambda old: (old.file, old.runtime) == (outcome.file, outcome.runtime))
