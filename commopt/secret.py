"""The secret of a job, which proves that a message is from one of its ranks."""

import os
from pathlib import Path

from commopt.errors import ConfigError

_LEAST = 16  # bytes of a secret; a shorter one can be guessed


def given_secret() -> bytes | None:
    """The job's secret: COMMOPT_SECRET, or what is in the file that COMMOPT_SECRET_FILE names; None without either. Raises ConfigError."""
    keys = [key for key in ("COMMOPT_SECRET", "COMMOPT_SECRET_FILE") if key in os.environ]
    if not keys:
        return None
    value = os.environ[keys[0]]
    try:
        secret = Path(value).read_bytes().strip() if keys == ["COMMOPT_SECRET_FILE"] else os.fsencode(value)
    except (OSError, ValueError) as error:
        raise ConfigError(f"environment: COMMOPT_SECRET_FILE={value}: {error}") from None
    if len(keys) > 1:
        raise ConfigError("environment: COMMOPT_SECRET and COMMOPT_SECRET_FILE are both set; unset one of them")
    if len(secret) < _LEAST:
        raise ConfigError(
            f"environment: {keys[0]} gives a secret of {len(secret)} bytes, which can be guessed; give {_LEAST} or more, such as the "
            "output of: openssl rand -hex 32"
        )
    return secret
