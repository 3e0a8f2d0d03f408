"""One attempt at getting a file's bytes from elsewhere: over HTTP, or from a command's output."""

import http.client
import os
import select
import signal
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import BinaryIO

from titans_scale.data.reading.faults import LostError, ReadError

Blocks = Generator[tuple[int, bytes], None, None]
"""Pairs of an offset and the bytes there."""
BLOCK = 1 << 20
PASSING = {408, 416, 429}
"""HTTP states below 500 that another attempt may find changed."""
NOTHING_FROM_THERE = 416
COMMAND_NOT_FOUND = {126, 127}


def http_blocks(url: str, *, start: int, timeout: float) -> Blocks:
    """A file from byte `start` on; from 0 on where the server sends files whole only.

    Args:
        timeout: seconds of silence after which the attempt has failed.
    Raises:
        ReadError: it failed, or ended early.   LostError: the server says that there is no such file for us.
    """
    headers = {"User-Agent": "titans_scale", **({"Range": f"bytes={start}-"} if start else {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as response:
            goes_on = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            offset = start if goes_on else 0
            while block := response.read1(BLOCK):
                yield offset, block
                offset += len(block)
            if response.length:  # read1 does not tell an end from a connection that broke
                raise ReadError(f"the connection ended {response.length} bytes too early")
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == NOTHING_FROM_THERE:
            yield 0, b""  # what there is so far cannot be gone on with
        kind = ReadError if error.code in PASSING or error.code >= 500 else LostError
        raise kind(f"the server answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise ReadError(_reason(error.reason, timeout)) from error
    except (OSError, http.client.HTTPException) as error:
        raise ReadError(_reason(error, timeout)) from error


def pipe_blocks(command: str, *, timeout: float) -> Blocks:
    """All that a shell command writes.

    Args:
        timeout: seconds of silence after which it is killed, with all that it started.
    Raises:
        ReadError: it was silent, or ended badly, with the last line that it wrote to stderr.   LostError: there is no such command.
    """
    with tempfile.TemporaryFile() as errors:
        with _running(command, errors) as process:
            assert process.stdout is not None
            output, offset = select.poll(), 0
            output.register(process.stdout, select.POLLIN)
            while True:
                if not output.poll(timeout * 1000):
                    raise ReadError(f"the command was silent for {timeout:g} s")
                if not (block := os.read(process.stdout.fileno(), BLOCK)):
                    break
                yield offset, block
                offset += len(block)
            try:
                status = process.wait(timeout)
            except subprocess.TimeoutExpired:
                raise ReadError(f"the command closed its output and did not end for {timeout:g} s") from None
        if status:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().rpartition("\n")[2][:200]
            kind = LostError if status in COMMAND_NOT_FOUND else ReadError
            raise kind(f"the command ended with status {status}" + (f": {said}" if said else ""))


@contextmanager
def _running(command: str, errors: BinaryIO) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a process group of its own; a block that does not end well ends the whole group."""
    process = subprocess.Popen(
        command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True, bufsize=0
    )
    with process:
        try:
            yield process
        except BaseException:  # also when the reader closes the generator
            os.killpg(process.pid, signal.SIGKILL)
            raise


def _reason(error: object, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"the server was silent for {timeout:g} s"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
