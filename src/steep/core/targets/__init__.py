"""`_target_`: any callable named in the configuration, found, announced, checked and called.

Three forms: an import path (`my_pkg.models.build`), a file and object (`./my_model.py:build`, relative to the current
directory), a library callable (`transformers.AutoModelForCausalLM.from_config`). The other keys of the mapping are its
arguments; a `_target_` nested in them, in lists too, is built first. Arguments are compared with the signatures, of
nested targets too, before anything is called, and all mistakes are reported together.

A configuration with targets is as trusted as a script: `announce` says a line for every target that is not steep's, torch's or
transformers' own, before `check`, `resolve` or `build` imports it. With `allow_code=False` (`--no-code`) those are
refused: see no_code.py. What a run's config.yaml names when the run is read back runs only where training here has run it
(trained_here.py) or the user allows it. No torch and no transformers unless a target names them.
"""

from steep.core.targets.building import build, check, check_run
from steep.core.targets.finding import TargetProblems, find_targets
from steep.core.targets.no_code import announce
from steep.core.targets.resolving import resolve
from steep.core.targets.trained_here import code_is_allowed, note_trained

__all__ = [
    "TargetProblems",
    "announce",
    "build",
    "check",
    "check_run",
    "code_is_allowed",
    "find_targets",
    "note_trained",
    "resolve",
]
