"""`python -m steep` and the console script `steep`. Ctrl-C is answered from here on, while the command is still imported."""

import atexit
import os
import signal
import sys
from typing import Any

INTERRUPTED = 130


def main() -> None:
    """Entry point of the console script. Ends the process with the command's exit code."""
    codes: list[int] = []
    atexit.register(_end, codes)  # the first that is registered is the last that is called
    try:
        from steep.cli.main import main as command  # inside, so that a Ctrl-C meanwhile is answered

        codes.append(command())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        codes.append(INTERRUPTED)
    signal.signal(signal.SIGINT, _leave)
    sys.exit(codes[0])


def _leave(number: int, frame: Any) -> None:
    """All work is done: nothing is lost by leaving at once."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def _end(codes: list[int]) -> None:
    """Leave with the exit code of an interruption. CPython ends a process by SIGINT itself, whatever its exit code, if a
    KeyboardInterrupt has passed through `exec` of a text, which is how a dataclass is made (run_eval_code_obj in pythonrun.c)."""
    if codes == [INTERRUPTED]:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
