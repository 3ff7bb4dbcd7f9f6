"""Triton Inference Server as a process: found, started, waited for until it answers rightly, watched, and stopped."""

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
from deploy.serving.options import ListenOptions
from illama.atomic_write import file_lock
from illama.errors import UserError

EXIT_SECONDS = 10  # for requests under way when it is told to stop
WATCH_SECONDS = 2  # between two checks of a running server
_AGAIN_SECONDS = 0.5  # and after one that failed
_BACKEND_SECONDS = 30  # without a process of the Python backend, after which none will come
_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "illama_serve_"
_STACK_BYTES = 256 << 20  # of a thread: Triton 2.51 puts a request's JSON there, and 8 MB of it end the server
_PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>
_LIBC = ctypes.CDLL(None)  # now: a forked child of a threaded process can no longer load it


@dataclass(frozen=True)
class RunningServer:
    """A server that was ready to answer.

    Attributes:
        process: tritonserver's.
        served: what it serves, to be checked.
    """

    process: subprocess.Popen[bytes]
    served: ServedRepository

    def watch(self) -> None:
        """Check the server every :data:`WATCH_SECONDS`, for as long as it runs and answers.

        Raises:
            UserError: it stopped by itself, a process of its Python backend died, or it does not give its known
                answers, twice in a row.
        """
        failed, answers_due = False, 0.0
        while True:
            with suppress(subprocess.TimeoutExpired):
                status = self.process.wait(_AGAIN_SECONDS if failed else WATCH_SECONDS)
                raise UserError(f"tritonserver stopped by itself with status {status}: its log says why")
            try:
                self.served.check_models()
                if (start := time.monotonic()) >= answers_due:
                    self.served.check_answers()
                    answers_due = start + 10 * (time.monotonic() - start)  # a tenth of the time, for a slow network
                failed = False
            except LoadingError:  # again: a file of it changed
                pass
            except (UnhealthyError, TimeoutError) as error:
                if failed:
                    raise UserError(f"the server no longer answers and is stopped: {error or 'no answer'}") from error
                failed, answers_due = True, 0.0


def serve(repository: Path, options: ListenOptions) -> None:
    """Runs a server until Ctrl-C or SIGTERM.

    Raises:
        UserError: the server does not start or no longer answers.
    """
    try:
        with running_server(repository, options) as server:
            print(
                f"ready: http://{options.address}:{options.http_port}, gRPC {options.grpc_port}, metrics "
                f"{options.metrics_port}; Ctrl-C stops it\n"
                "Triton has no authentication: everyone who can reach these ports can use it",
                flush=True,
            )
            server.watch()
    except KeyboardInterrupt:
        print("stopped")


@contextmanager
def running_server(repository: Path, options: ListenOptions, log: IO[bytes] | None = None) -> Iterator[RunningServer]:
    """A server that gives its known answers, stopped at the end of the block.

    Args:
        log: where its messages go; the terminal's standard error if not given.

    Raises:
        UserError: there is no tritonserver here, a port is taken, a model cannot be loaded, or the server stopped
            before it was ready.
    """
    _check_ports(options)
    with private_names() as folder:
        command, environment = _find_server(folder)
        models = folder / "models"
        models.symlink_to(repository.resolve())  # a path with a space in it would end the Python backend
        command += _arguments(models, f"{folder.name}_", options)
        # In a session of its own, so that Ctrl-C reaches it through this process alone, once. It ends with this process
        # even where that is killed.
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
    """UserError for an address or a port that nothing can listen on."""
    ports = {options.http_port, options.grpc_port, options.metrics_port}
    if len(ports) < 3 or not all(0 < port < 1 << 16 for port in ports):
        raise UserError("--http-port, --grpc-port and --metrics-port are three different numbers from 1 to 65535")
    try:
        ipaddress.IPv4Address(options.address)
    except ValueError as error:
        raise UserError(f"--address is one of IPv4, such as 127.0.0.1 or 0.0.0.0, not {options.address!r}") from error
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
    """A new temporary folder, whose name is also the prefix of a server's shared memory; both are cleared at the end.

    Triton leaves shared memory behind where a process of it was killed. What an earlier server of this toolkit left is
    cleared too, if nobody holds its lock any more.

    Raises:
        UserError: the folder for temporary files has a name that Triton's Python backend does not take.
    """
    if not re.fullmatch(r"[\w./-]+", tempfile.gettempdir(), re.ASCII):
        raise UserError(
            f"Triton cannot work in {tempfile.gettempdir()!r}: set TMPDIR to a path without such characters"
        )
    for leftover in _SHARED_MEMORY.glob(f"{_PREFIX}*.lock"):
        with suppress(OSError), file_lock(leftover) as held:  # BlockingIOError: in use
            if held:
                _clear(leftover.stem)
    name = f"{_PREFIX}{secrets.token_hex(8)}"
    with file_lock(_SHARED_MEMORY / f"{name}.lock", wait=True):  # for a sweep that came before the lock
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
    """In a server about to be started: it ends when the process that starts it ends, and has large stacks."""
    _, most = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = _STACK_BYTES if most == resource.RLIM_INFINITY else min(_STACK_BYTES, most)
    resource.setrlimit(resource.RLIMIT_STACK, (wanted, most))
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


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


def _arguments(repository: Path, prefix: str, options: ListenOptions) -> list[str]:
    poll = [f"--repository-poll-secs={options.poll_seconds}"] if options.poll_seconds else []
    return [
        f"--model-repository={repository}",
        "--disable-auto-complete-config",
        "--exit-on-error=false",  # so that it can be asked why a model was not loaded
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
        # Nobody registers shared memory here, by which a client could read what the server's processes exchange.
        f"--http-restricted-api=shared-memory:key={secrets.token_hex(16)}",
        f"--grpc-restricted-protocol=shared-memory:key={secrets.token_hex(16)}",
    ]


def _wait_until_ready(server: RunningServer) -> None:
    """Until the server has loaded its models, or tried to, and gives its known answers; UserError if it does not."""
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
            raise UserError("no process of Triton's Python backend lives, and it waits for one: its log says why")
        time.sleep(0.1)
    raise UserError(
        f"tritonserver stopped with status {server.process.returncode} before it was ready: its log says why"
    )


def _stop(process: subprocess.Popen[bytes], patience: float) -> None:
    """Tell the server to stop; kill it and its backends if it takes longer, or at a second Ctrl-C or SIGTERM."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        process.wait(patience)  # Triton gives its requests EXIT_SECONDS, then it unloads the models
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
