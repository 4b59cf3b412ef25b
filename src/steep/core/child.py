"""Python programs that steep starts itself. In: a module. Out: a command line. No torch.

`python -m` and `python -c` put the current folder in front of all other modules, so that a `json.py` there would run in place of
the standard library's. Here the folder is taken out before anything is imported (`-P` does the same from Python 3.11 on).
"""

from __future__ import annotations

import os
import sys

_RUN = (
    "import sys; del sys.path[0]; import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def python_command(module: str, *arguments: str, python: str = sys.executable) -> list[str]:
    """The command line that does what `python -m module arguments` does, without modules of the current folder."""
    return [python, "-c", _RUN, module, *arguments]


def module_path() -> list[str]:
    """Where a child may import from: `sys.path` of this process without the current folder."""
    here = os.path.realpath(os.getcwd())
    return [entry for entry in sys.path if entry and os.path.realpath(entry) != here]
