"""commopt for DeepSpeed scripts: `from commopt.deepspeed import initialize` instead of `from deepspeed import initialize`."""

from commopt.frameworks.deepspeed import initialize, install

__all__ = ["initialize", "install"]
