"""Runs Triton Inference Server: finds it, starts it, waits until it answers correctly, monitors it, and stops it."""

from __future__ import annotations

import ctypes
import importlib.util
import ipaddress
import os
import re
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from deploy.serving.health import STUB, LoadingError, ServedRepository, UnhealthyError, live_backends
from deploy.serving.serving_options import ListenOptions
from illama.atomic_write import file_lock
from illama.bundle import as_run
from illama.errors import UserError

EXIT_SECONDS = 10  # time for running requests when the server is stopped
WATCH_SECONDS = 2  # between two checks of a running server
_RETRY_SECONDS = 0.5  # after a failed check
_BACKEND_SECONDS = 30  # without a process of the Python backend, after which the start has failed
_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "illama_serve_"
_STACK_BYTES = 256 << 20  # of a thread: Triton 2.51 stores a request's JSON on it, and 8 MB crash the server
_PR_SET_PDEATHSIG = 1  # from Linux's <sys/prctl.h>
_LIBC = ctypes.CDLL(None)  # loaded here, because a forked child of a process with threads cannot load it


@dataclass(frozen=True)
class RunningServer:
    """A server that has started.

    Attributes:
        process: process of tritonserver.
        served: its repository, for checks.
    """

    process: subprocess.Popen[bytes]
    served: ServedRepository

    def watch(self) -> None:
        """Checks the server every :data:`WATCH_SECONDS`.

        Raises:
            UserError: the server stopped, or two checks in a row failed: a process of its Python backend died, or its
                answers are not the known ones.
        """
        failed, next_answers = False, 0.0
        while True:
            with suppress(subprocess.TimeoutExpired):
                status = self.process.wait(_RETRY_SECONDS if failed else WATCH_SECONDS)
                raise UserError(f"tritonserver stopped with status {status}: see its log")
            try:
                self.served.check_models()
                if (start := time.monotonic()) >= next_answers:
                    self.served.check_answers()
                    next_answers = start + 10 * (time.monotonic() - start)  # at most a tenth of the time is for checks
                failed = False
            except LoadingError:  # a polling server loads a changed model
                pass
            except (UnhealthyError, TimeoutError) as error:
                if failed:
                    raise UserError(
                        f"the server no longer answers correctly and is stopped: {error or 'no answer'}"
                    ) from error
                failed, next_answers = True, 0.0


def serve(repository: Path, options: ListenOptions) -> None:
    """Runs a server until Ctrl-C or SIGTERM.

    Raises:
        UserError: the server does not start or no longer answers.
    """
    try:
        with running_server(repository, options) as server:
            url = f"http://{options.address}:{options.http_port}"
            print(
                f"ready: {url}, gRPC {options.grpc_port}, metrics {options.metrics_port}; Ctrl-C stops it\n"
                "Triton has no authentication: everyone who can reach these ports can use it\n"
                + as_run(
                    f"next: python deploy/predict.py photo.jpg --server {url}/v2/models/{server.served.models[0]}"
                ),
                flush=True,
            )
            server.watch()
    except KeyboardInterrupt:
        print("stopped")


@contextmanager
def running_server(repository: Path, options: ListenOptions, log: IO[bytes] | None = None) -> Iterator[RunningServer]:
    """Starts a server, waits until it gives its known answers, and stops it at the end of the block.

    Args:
        log: file for its messages. Defaults to standard error.

    Raises:
        UserError: tritonserver is not installed, a port is in use, a model cannot be loaded, or the server stopped
            before it was ready.
    """
    _check_ports(options)
    with private_names() as folder:
        command, environment = _find_server(folder)
        models = folder / "models"
        models.symlink_to(repository.resolve())  # a path with a space crashes the Python backend
        command += _arguments(models, f"{folder.name}_", options)
        # Ctrl-C does not reach a process in a session of its own; _stop ends it. If this process is killed, the server
        # ends too (_prepare_process).
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=log or sys.stderr,
            stderr=log,
            start_new_session=True,
            preexec_fn=_prepare_process,
        )
        server, patience = RunningServer(process, ServedRepository(options.url, repository)), EXIT_SECONDS + 20
        try:
            _wait_until_ready(server)
            yield server
        except UserError:
            patience = 2
            raise
        finally:
            _stop(process, patience)


def _check_ports(options: ListenOptions) -> None:
    """Raises UserError for an address or a port on which the server cannot listen."""
    ports = {options.http_port, options.grpc_port, options.metrics_port}
    if len(ports) < 3 or not all(0 < port < 1 << 16 for port in ports):
        raise UserError("--http-port, --grpc-port and --metrics-port must be three different numbers from 1 to 65535")
    try:
        ipaddress.IPv4Address(options.address)
    except ValueError as error:
        raise UserError(
            f"--address must be an IPv4 address, such as 127.0.0.1 or 0.0.0.0, not {options.address!r}"
        ) from error
    for kind in ("http", "grpc", "metrics"):
        port = getattr(options, f"{kind}_port")
        try:
            with socket.socket() as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind((options.address, port))
        except OSError as error:
            raise UserError(
                f"cannot listen on {options.address}:{port} ({error}): give another --{kind}-port or --address"
            ) from error


@contextmanager
def private_names() -> Iterator[Path]:
    """Creates a temporary folder, whose name also prefixes the shared memory of a server; both are deleted at the end.

    Triton does not delete its shared memory if one of its processes is killed. That of earlier servers of this toolkit
    is deleted too, unless a running process holds their lock.

    Raises:
        UserError: Triton's Python backend does not support the path of the folder for temporary files.
    """
    if not re.fullmatch(r"[\w./-]+", tempfile.gettempdir(), re.ASCII):
        raise UserError(
            f"Triton cannot use the folder {tempfile.gettempdir()!r}: set TMPDIR to a path of letters, digits and ._/-"
        )
    for leftover in _SHARED_MEMORY.glob(f"{_PREFIX}*.lock"):
        with suppress(OSError), file_lock(leftover) as held:  # BlockingIOError: its server runs
            if held:
                _clear(leftover.stem)
    name = f"{_PREFIX}{secrets.token_hex(8)}"
    with file_lock(_SHARED_MEMORY / f"{name}.lock", wait=True):  # wait: another process may hold it to clean up
        folder = Path(tempfile.gettempdir()) / name
        folder.mkdir(0o700)
        try:
            yield folder
        finally:
            _clear(name)


def _clear(name: str) -> None:
    shutil.rmtree(Path(tempfile.gettempdir()) / name, ignore_errors=True)
    for path in _SHARED_MEMORY.glob(f"{name}_*"):
        path.unlink(missing_ok=True)


def _prepare_process() -> None:
    """Runs in the child before tritonserver: it gets large stacks, and SIGTERM when the parent process ends."""
    _, limit = resource.getrlimit(resource.RLIMIT_STACK)
    size = _STACK_BYTES if limit == resource.RLIM_INFINITY else min(_STACK_BYTES, limit)
    resource.setrlimit(resource.RLIMIT_STACK, (size, limit))
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _find_server(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Returns (command, environment) of the tritonserver on PATH, else of that in the package nvidia-pytriton.

    Args:
        folder: folder for copies of the package's programs, which installers may leave without execute permission.
    """
    # The backend embeds a Python that ignores PYTHONPATH and uses the packages of the first python3 on PATH.
    path = os.environ.get("PATH", os.defpath)
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), path])}
    if found := shutil.which("tritonserver"):
        return [found], environment
    package = importlib.util.find_spec("pytriton")
    if package is None or package.origin is None:
        raise UserError(
            "tritonserver not found: pip install --no-deps nvidia-pytriton, or use NVIDIA's Triton container"
        )
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


def _arguments(repository: Path, prefix: str, options: ListenOptions) -> list[str]:
    poll = [f"--repository-poll-secs={options.poll_seconds}"] if options.poll_seconds else []
    return [
        f"--model-repository={repository}",
        "--disable-auto-complete-config",
        "--exit-on-error=false",  # so that the server can tell why a model was not loaded
        f"--model-control-mode={'poll' if poll else 'none'}",
        *poll,
        f"--backend-config=python,shm-region-prefix-name={prefix}",
        f"--http-address={options.address}",
        f"--http-port={options.http_port}",
        f"--grpc-address={options.address}",
        f"--grpc-port={options.grpc_port}",
        f"--metrics-address={options.address}",
        f"--metrics-port={options.metrics_port}",
        f"--exit-timeout-secs={EXIT_SECONDS}",
        # Registered shared memory would let clients read what the server's processes exchange.
        f"--http-restricted-api=shared-memory:key={secrets.token_hex(16)}",
        f"--grpc-restricted-protocol=shared-memory:key={secrets.token_hex(16)}",
    ]


def _wait_until_ready(server: RunningServer) -> None:
    """Waits until the server gives its known answers; raises UserError if it cannot load its models or stops."""
    served, seen = server.served, time.monotonic()
    while server.process.poll() is None:
        if served.is_live():
            try:
                return served.check()
            except LoadingError:
                pass
            except (UnhealthyError, TimeoutError) as error:
                raise UserError(f"the server cannot serve {served.folder}: {error or 'no answer'}") from error
        if any(path.resolve().is_relative_to(served.folder.resolve()) for _, path in live_backends()):
            seen = time.monotonic()
        elif time.monotonic() - seen > _BACKEND_SECONDS:
            raise UserError("Triton's Python backend did not start: see the server's log")
        time.sleep(0.1)
    raise UserError(f"tritonserver stopped with status {server.process.returncode} before it was ready: see its log")


def _stop(process: subprocess.Popen[bytes], patience: float) -> None:
    """Stops the server; kills it and its backends after ``patience`` seconds, or at a second Ctrl-C or SIGTERM."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        process.wait(patience)  # running requests get EXIT_SECONDS, then the models are unloaded
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
