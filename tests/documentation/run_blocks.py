"""Runs the blocks of one page, one after the other, in the current directory. Started as a program by test_commands.

Standard input: JSON, a list of [language, commands or program]. A `steep` command runs in this process, through the command's own
entry, so that torch is imported once for all; anything else goes to bash. Ends with code 1 at the first that fails.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch  # noqa: F401 - a command that needs no torch keeps it away from a process that has not imported it

from steep.cli.main import run


def run_line(line: str) -> int:
    """The exit code of one line of a bash block."""
    words = shlex.split(line, comments=True)
    if words[0] == "steep":
        return run(words[1:])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(["bash", "-c", line], env={**os.environ, "PATH": path}, check=False).returncode


def main() -> int:
    """0 if everything ended with 0."""
    for language, content in json.load(sys.stdin):
        if language == "python":
            exec(compile(content, "<page>", "exec"), {"__name__": "__main__"})
            continue
        for line in content:
            print(f"$ {line}", flush=True)
            code = run_line(line)
            sys.stdout.flush()
            if code != 0:
                print(f"exit code {code}: {line}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
