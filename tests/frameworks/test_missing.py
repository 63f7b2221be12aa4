"""Frameworks that are not installed."""

from __future__ import annotations

import importlib
import sys

import pytest

from commopt.errors import MissingExtra


@pytest.mark.parametrize("name", ["accelerate", "deepspeed", "lightning", "transformers"])
def test_without_the_package_the_import_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in (name, *(("lightning.pytorch", "pytorch_lightning") if name == "lightning" else ())):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"commopt.frameworks.{name}", raising=False)
    with pytest.raises(MissingExtra, match=rf"{name}, which is not installed: pip install 'commopt\[{name}\]'"):
        importlib.import_module(f"commopt.frameworks.{name}")
