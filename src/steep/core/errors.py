"""Every error that steep raises for a person to read: all are SteepErrors.

A message says what was given, what is needed and what would work. The command line prints it without a traceback;
any other exception is a bug in steep and keeps its traceback.
"""


class SteepError(Exception):
    """An error with a message for the person at the terminal."""

    exit_code = 1


class ConfigError(SteepError):
    """A key, value or combination in a configuration or on the command line that cannot be used. May list several."""

    exit_code = 2


class CallError(ConfigError, TypeError):
    """Arguments that a function of `import steep` does not take."""


class DataError(SteepError):
    """A source, token store or sample order that cannot be used."""


class ModelError(SteepError):
    """A model, tokenizer or output head that cannot be used."""


class CheckpointError(SteepError):
    """A checkpoint or run directory that cannot be used."""


class TrainingError(SteepError):
    """A run that had to stop (NaN, leak, no space left)."""


class DamagedFileError(SteepError, ValueError):
    """A file does not hold what was written into it."""


class FileError(SteepError):
    """A file or folder that the operating system does not let steep read or write."""


class MissingExtraError(SteepError):
    """An optional dependency that is needed here and not installed."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package {package!r}. Install it with: pip install 'steep[{extra}]'")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class; a library's messages may be many lines long."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
