"""Stored results of a benchmark: one JSON object a line, found by a cell's name and settings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


class Store:
    """The cells of a .jsonl file; each line holds a cell's name, its settings and its result.

    A cell stored with other settings than asked for does not count. redo: patterns of names that do not count either, until
    they are stored anew. A broken line is no cell. `put` replaces the whole file at once, so an interruption leaves the old one.
    """

    def __init__(self, file: Path, redo: Iterable[str] = ()) -> None:
        self.file, self._redo, self._renewed = file, tuple(redo), set[str]()
        self._cells = self._read()

    @property
    def names(self) -> list[str]:
        return list(self._cells)

    def get(self, name: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """The cell of that name, if it has these settings; whatever its settings without."""
        if name not in self._renewed and any(fnmatchcase(name, pattern) for pattern in self._redo):
            return None
        found = self._cells.get(name)
        if found is None or settings is None or _as_json(found["settings"]) == _as_json(settings):
            return found
        return None

    def put(self, name: str, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        self._cells = {**self._read(), name: {"name": name, "settings": settings, **result}}  # others may have written
        self._renewed.add(name)
        lines = [json.dumps(cell, allow_nan=False) + "\n" for cell in self._cells.values()]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_name(f"{self.file.name}.{os.getpid()}.new")
        unfinished.write_text("".join(lines))
        unfinished.replace(self.file)

    def _read(self) -> dict[str, dict[str, Any]]:
        cells = {}
        for line in self.file.read_text().splitlines() if self.file.exists() else ():
            try:
                cell = json.loads(line)
                cells[cell["name"]] = {**cell, "settings": cell.get("settings", {})}
            except (ValueError, KeyError, TypeError):
                continue
        return cells


def _as_json(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)
