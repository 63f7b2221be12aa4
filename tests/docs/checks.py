"""Which kind of file a YAML or JSON file is, judged by its keys, and whether its reader would accept it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

import commopt
from commopt.cli.training import check_methods, chosen_methods
from commopt.cluster.spec import load_cluster, load_run
from commopt.errors import ConfigError

DEEPSPEED_OPTIMIZERS = {"Adam", "AdamW", "SGD", "Lamb", "Lion"}  # beside those that commopt brings back
DEEPSPEED_KEYS = {"bf16", "commopt", "fp16", "gradient_accumulation_steps", "gradient_clipping", "optimizer"}
DEEPSPEED_KEYS |= {"scheduler", "train_batch_size", "train_micro_batch_size_per_gpu", "zero_optimization"}


def check_file(path: Path) -> str:
    """The kind of a file: "cluster", "run", "method", "deepspeed", "compose" or "manifest".

    Raises ConfigError, or the parser's error, for a file that is none of these or has mistakes.
    """
    documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))  # JSON is YAML too
    if path.suffix == ".json":
        documents = [json.loads(path.read_text(encoding="utf-8"))]
    if not documents or not all(isinstance(document, Mapping) for document in documents):
        raise ConfigError("holds no keys and values")
    for kind, (key, check) in _KINDS.items():
        if all(key in document for document in documents):
            check(path, documents)
            return kind
    wanted = ", ".join(f"{key!r} ({kind})" for kind, (key, _) in _KINDS.items())
    raise ConfigError(f"is no kind of file that is known here; one of these keys says which: {wanted}")


def _check_run(path: Path, _: list[Any]) -> None:
    run = load_run(path)
    check_methods(run, chosen_methods(run, []))


def _check_deepspeed(path: Path, documents: list[Any]) -> None:
    from commopt.frameworks.deepspeed_config import LEGACY, read_wanted

    for key in documents[0]:
        if key not in DEEPSPEED_KEYS:
            raise ConfigError(f"{key}: is no key of a DeepSpeed configuration that these pages use")
    optimizer = documents[0].get("optimizer", {}).get("type", "Adam")
    read_wanted(documents[0], None if "optimizer" in documents[0] else "passed by the script")
    if optimizer.lower() not in LEGACY and optimizer not in DEEPSPEED_OPTIMIZERS:
        raise ConfigError(f"optimizer.type: {optimizer!r} is none of {', '.join(sorted(DEEPSPEED_OPTIMIZERS))}")


def _check_compose(path: Path, documents: list[Any]) -> None:
    for name, service in documents[0]["services"].items():
        if not isinstance(service, Mapping) or not {"image", "build"} & set(service):
            raise ConfigError(f"services.{name}: has neither an image nor a build")


def _check_manifest(path: Path, documents: list[Any]) -> None:
    for document in documents:
        name = document.get("metadata", {}).get("name")
        if not isinstance(document.get("kind"), str) or not isinstance(name, str):
            raise ConfigError("a manifest has a kind and a metadata.name")


_KINDS: dict[str, tuple[str, Callable[[Path, list[Any]], object]]] = {
    "manifest": ("apiVersion", _check_manifest),
    "compose": ("services", _check_compose),
    "run": ("program", _check_run),
    "cluster": ("nodes", lambda path, _: load_cluster(path)),
    "method": ("method", lambda path, _: commopt.build(path)),
    "deepspeed": ("train_micro_batch_size_per_gpu", _check_deepspeed),
    "deepspeed, by its whole batch": ("train_batch_size", _check_deepspeed),
}
