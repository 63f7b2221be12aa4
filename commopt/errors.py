"""Everything commopt raises on purpose.

CommoptError
├── ConfigError        a YAML file, an option or an argument is wrong; nothing has been started
├── AttachError        a method, a model and an optimizer do not fit together; nothing has been changed
├── GradientsChanged   gradients were modified between backward and step() where that would change the momentum instead
├── GroupError         an exchange failed: a peer died, timed out, or sent another layout
├── CheckpointError    a checkpoint does not belong to this model, method or world
├── MissingExtra       a package that only this integration needs is not installed
└── LaunchError        a job could not be started, or failed
    └── EmulationError this machine cannot emulate the links that were asked for
"""

import contextlib
import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any


class CommoptError(Exception):
    """Base of every error that commopt raises on purpose."""


class ConfigError(CommoptError, ValueError):
    """A YAML file, an option or an argument is wrong; raised before any process starts."""


class AttachError(CommoptError, ValueError):
    """A method, a model and an optimizer do not fit together; raised before anything is changed."""


class GradientsChanged(CommoptError, RuntimeError):
    """Gradients were modified between backward and `step()`, where they are only a copy of the momentum."""


class GroupError(CommoptError, RuntimeError):
    """An exchange failed: a peer died, timed out, or sent another layout."""


class CheckpointError(CommoptError, RuntimeError):
    """A checkpoint does not belong to this model, method or world."""


class MissingExtra(CommoptError, ImportError):
    """A package that only this integration needs is not installed; the message is one line that says what to install."""

    def __init__(self, what: str, package: str, *others: str) -> None:
        super().__init__(f"{what} needs {package}, which is not installed: pip install {' '.join([package, *others])}")


class LaunchError(CommoptError, RuntimeError):
    """A job could not be started, or failed."""


class EmulationError(LaunchError):
    """This machine cannot emulate the links that were asked for."""


def check_option(option: str, value: Any, is_valid: Callable[[Any], bool], wanted: str) -> None:
    """Raise ConfigError, with the value and what to write instead, unless `is_valid(value)`; a wrong type, inf and nan are not valid."""
    with contextlib.suppress(TypeError, ValueError):
        if not isinstance(value, bool) and value not in (math.inf, -math.inf) and is_valid(value):
            return
    raise ConfigError(f"{option}: {value!r:.80} is out of range; write {wanted}")


def check_finite(option: str, value: Any) -> None:
    """Raise ConfigError for an inf or a nan; leave anything else to others."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{option}: {value!r} is out of range; write a finite number")


def check_flag(option: str, value: Any) -> None:
    """Raise ConfigError unless value is true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{option}: {value!r:.80} is out of range; write true or false")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'density'?"` when a known word is close to `word`, else the sorted list of known words."""
    choices = sorted(known)
    close = difflib.get_close_matches(word, choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(choices)}"
