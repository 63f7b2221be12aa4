"""How users name a method, the same everywhere: a word, a `method:` block, or a file that holds one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

from commopt.errors import ConfigError

Choice: TypeAlias = str | Path | Mapping[str, object]

_FORMS = "write a name as in 'dgc', or a block as in {name: dgc, density: 0.001}"
_SUFFIXES = (".yaml", ".yml", ".json")


def read_choice(choice: Choice) -> tuple[str, dict[str, Any]]:
    """The name and the options of a choice.

    `"dgc"`, `{"name": "dgc", "density": 0.001}`, `{"method": "dgc", "density": 0.001}`, `{"dgc": {"density": 0.001}}`, or the path of
    a YAML or JSON file whose key `method` holds one of these. Raises ConfigError for anything else; options are not checked.
    """
    if is_file(choice):
        from commopt.reading import read_yaml  # importing PyYAML and pydantic takes time

        path = Path(choice)
        data = read_yaml(path)
        if "method" not in data:
            raise ConfigError(f"{path}: method: is missing; {_FORMS} under it")
        if isinstance(data["method"], str):  # the file's other keys are its options
            return data["method"], {key: value for key, value in data.items() if key != "method"}
        try:
            return read_choice(data["method"])
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    if isinstance(choice, str):
        return choice, {}
    if not isinstance(choice, Mapping):
        raise ConfigError(f"method: {choice!r:.80} is not a method; {_FORMS}")
    options = dict(choice)
    if "name" in options and "method" in options:
        raise ConfigError(
            f"name: {options['name']!r:.80} stands beside method: {options['method']!r:.80}; write one of the two"
        )
    for key in {"name", "method"} & options.keys():  # one of them, or none
        named = options.pop(key)
        if key == "method" and isinstance(named, Mapping) and not options:
            return read_choice(named)
        if not isinstance(named, str):
            raise ConfigError(f"{key}: {named!r:.80} is not a method's name; {_FORMS}")
        return named, options
    if len(options) == 1:
        name, inner = next(iter(options.items()))
        if isinstance(name, str) and (inner is None or isinstance(inner, Mapping)):
            return name, dict(inner or {})
    raise ConfigError(f"method: {options!r:.80} names no method; {_FORMS}")


def is_file(choice: Choice) -> TypeGuard[str | Path]:
    """Whether a choice is the path of a file that holds it."""
    return isinstance(choice, Path) or (isinstance(choice, str) and choice.endswith(_SUFFIXES))


def keys_beside(path: str | Path) -> list[str]:
    """The other keys of a file with a block under `method`: a run's, none of which may be an option of the method."""
    from commopt.reading import read_yaml

    data = read_yaml(Path(path))
    return [] if isinstance(data["method"], str) else [key for key in data if key != "method"]
