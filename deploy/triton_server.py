"""Triton Inference Server as a process: found, started, waited for until it answers, and stopped."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from illama.errors import UserError

STUB = "triton_python_backend_stub"
EXIT_SECONDS = 10  # for requests under way when it is told to stop


@dataclass(frozen=True, kw_only=True)
class ListenOptions:
    """Where the server listens.

    Attributes:
        address: 127.0.0.1 for this machine alone, 0.0.0.0 for every other too.
        http_port: of the HTTP protocol.
        grpc_port: of the gRPC protocol.
        metrics_port: of Prometheus metrics.
        poll_seconds: how often the server looks for new versions; 0 for never.
    """

    address: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    poll_seconds: int = 0


@contextmanager
def running_server(
    repository: Path, options: ListenOptions, log: IO[bytes] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A server that is ready to answer, stopped at the end of the block.

    Args:
        log: where its messages go; the terminal's standard error if not given.

    Raises:
        UserError: there is no tritonserver here, or it stopped before it was ready.
    """
    with tempfile.TemporaryDirectory(prefix="triton-") as folder:
        command, environment = _find_server(Path(folder))
        command += _arguments(repository, options)
        # In a session of its own, so that Ctrl-C reaches it through this process alone, once.
        process = subprocess.Popen(
            command, env=environment, stdout=log or sys.stderr, stderr=log, start_new_session=True
        )
        try:
            _wait_until_ready(process, options)
            yield process
        finally:
            _stop(process)


def _find_server(folder: Path) -> tuple[list[str], dict[str, str]]:
    """(command, environment) of tritonserver: that on PATH, else the one in the nvidia-pytriton package.

    Args:
        folder: takes the package's files that must be executable, which an installer may have left otherwise.
    """
    # The backend embeds a Python that takes no heed of PYTHONPATH: its packages are those of the first python3 on PATH.
    path = os.environ.get("PATH", os.defpath)
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), path])}
    if found := shutil.which("tritonserver"):
        return [found], environment
    package = importlib.util.find_spec("pytriton")
    if package is None or package.origin is None:
        raise UserError("no tritonserver here: pip install --no-deps nvidia-pytriton, or use NVIDIA's Triton container")
    root, python = Path(package.origin).parent / "tritonserver", f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / python / STUB
    if not stub.exists():
        raise UserError(f"nvidia-pytriton has no Python backend for Python {python}: use another Python")
    shutil.copytree(root / "backends" / "python", folder / "python")
    for source, target in ((stub, folder / "python" / STUB), (root / "bin" / "tritonserver", folder / "tritonserver")):
        shutil.copyfile(source, target)
        target.chmod(0o755)
    libraries = [str(root.parents[1] / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR") or ""]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [*libraries, os.environ.get("LD_LIBRARY_PATH")]))
    return [str(folder / "tritonserver"), f"--backend-directory={folder}"], environment


def _arguments(repository: Path, options: ListenOptions) -> list[str]:
    poll = [f"--repository-poll-secs={options.poll_seconds}"] if options.poll_seconds else []
    return [
        f"--model-repository={repository}",
        "--disable-auto-complete-config",
        f"--model-control-mode={'poll' if poll else 'none'}",
        *poll,
        f"--http-address={options.address}",
        f"--http-port={options.http_port}",
        f"--grpc-address={options.address}",
        f"--grpc-port={options.grpc_port}",
        f"--metrics-address={options.address}",
        f"--metrics-port={options.metrics_port}",
        f"--exit-timeout-secs={EXIT_SECONDS}",
    ]


def _wait_until_ready(process: subprocess.Popen[bytes], options: ListenOptions) -> None:
    host = "127.0.0.1" if options.address == "0.0.0.0" else options.address
    url = f"http://{host}:{options.http_port}/v2/health/ready"
    while process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):  # not listening yet, or 400: models are still being loaded
            time.sleep(0.1)
    raise UserError(f"tritonserver stopped with status {process.returncode} before it was ready: its log says why")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(EXIT_SECONDS + 20)  # Triton gives its requests EXIT_SECONDS, then it unloads the models
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
