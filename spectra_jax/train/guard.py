"""What happens to a process from outside: a signal to stop, another run in the same folder, a step that never ends."""

import faulthandler
import fcntl
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spectra_jax.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Turns the first SIGTERM or SIGINT into a wish that the loop reads between steps; a second leaves at once.

    A thread of its own hears them: Python runs no handler while its main thread waits for a device.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "StopRequest":
        heard, self._told = os.pipe()
        os.set_blocking(self._told, False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._told)
        threading.Thread(target=self._listen, args=(heard,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._told)

    def _listen(self, heard: int) -> None:
        with open(heard, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] not in SIGNALS:  # of a handler that somebody else has installed
                    continue
                if self.signal:
                    os._exit(128 + number[0])
                self.signal = signal.Signals(number[0])
                text = f"{self.signal.name}: saving after this step, then leaving; once more to leave at once\n"
                os.write(2, text.encode())


class Watchdog:
    """Ends the process, with the stacks of all its threads on stderr, when `kick` has not come for `seconds`.

    It works where a hung collective or a stalled disk holds every Python thread; 0 seconds turns it off.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds

    def kick(self) -> None:
        """Starts the time anew."""
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__)

    def __enter__(self) -> "Watchdog":
        self.kick()
        return self

    def __exit__(self, *_: object) -> None:
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()


@contextmanager
def only_run_in(workdir: Path) -> Iterator[None]:
    """Holds the workdir for this process; the lock goes with the process, however it ends.

    Raises:
      UserError: another process holds it, or the folder cannot be written.
    """
    path = workdir / "lock"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"cannot write to {workdir}: {error.strerror}; use another --workdir") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"{workdir} is in use by process {file.read().strip() or 'unknown'}: two runs in one folder would "
                "overwrite each other; wait for it to end, or use another --workdir"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
