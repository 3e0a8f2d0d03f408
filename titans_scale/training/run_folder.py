"""The folder of a run: made if need be, and held by one run at a time."""

import errno
import fcntl
import os
from pathlib import Path
from typing import IO

from titans_scale.config import ConfigError

NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""What file systems without locks say; there the user has to see to it alone."""


class RunFolder:
    """Creates the folder and holds a lock on it until `close`; the system drops the lock if the process dies.

    Raises:
        ConfigError: another run holds it.   OSError: it cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock: IO[str] = (path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise ConfigError(f"another run is writing to {path}; wait for it, stop it, or set another training.output_dir") from error
        except OSError as error:
            if error.errno not in NO_LOCKS_HERE:
                raise
        # Workers that read data are forked from this process and may outlive it by seconds; the lock must not.
        os.register_at_fork(after_in_child=self._lock.close)

    def close(self) -> None:
        """Let the next run in."""
        self._lock.close()
