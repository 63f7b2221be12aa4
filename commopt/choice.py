"""A method as a user names it, the same everywhere: a word, a `method:` block, or a file that holds one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from commopt.errors import ConfigError

if TYPE_CHECKING:
    import torch

Choice: TypeAlias = str | Path | Mapping[str, Any]

_FORMS = "write a name as in 'dgc', or a block as in {name: dgc, density: 0.001}"
_SUFFIXES = (".yaml", ".yml", ".json")
# which optimizers an update method may stand in for, and what it takes over from their parameter groups
STANDS_FOR = {
    "onebit_adam": (("Adam", "AdamW"), ("lr", "betas", "eps", "weight_decay")),
    "zero_one_adam": (("Adam", "AdamW"), ("lr", "betas", "eps", "weight_decay")),
    "onebit_lamb": (("LAMB", "Lamb"), ("lr", "betas", "eps", "weight_decay")),
    "distributed_lion": (("Lion",), ("lr", "betas", "weight_decay")),
    "demo": (("SGD",), ("lr", "weight_decay")),
}


def read_choice(choice: Choice) -> tuple[str, dict[str, Any]]:
    """The name and the options of a choice.

    `"dgc"`, `{"name": "dgc", "density": 0.001}`, `{"method": "dgc", "density": 0.001}`, `{"dgc": {"density": 0.001}}`, or the path of
    a YAML or JSON file whose key `method` holds one of these. Raises ConfigError for anything else; options are not looked at.
    """
    if isinstance(choice, Path) or (isinstance(choice, str) and choice.endswith(_SUFFIXES)):
        from commopt.reading import read_yaml  # PyYAML, and pydantic, take their time

        path = Path(choice)
        data = read_yaml(path)
        if "method" not in data:
            raise ConfigError(f"{path}: method: is missing; {_FORMS} under it")
        try:
            return _of_file(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    if isinstance(choice, str):
        return choice, {}
    if not isinstance(choice, Mapping):
        raise ConfigError(f"method: {choice!r} is no method; {_FORMS}")
    options = dict(choice)
    if "name" in options and "method" in options:
        raise ConfigError(
            f"name: {options['name']!r} stands beside method: {options['method']!r}; write one of the two"
        )
    for key in ("name", "method"):
        if key not in options:
            continue
        named = options.pop(key)
        if key == "method" and isinstance(named, Mapping) and not options:
            return read_choice(named)
        if not isinstance(named, str):
            raise ConfigError(f"{key}: {named!r} is no method's name; {_FORMS}")
        return named, options
    if len(options) == 1:
        name, inner = next(iter(options.items()))
        if isinstance(name, str) and (inner is None or isinstance(inner, Mapping)):
            return name, dict(inner or {})
    raise ConfigError(f"method: {options!r} names no method; {_FORMS}")


def _of_file(data: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The choice under `method`. Beside a name stand its options; beside a block may stand what is no option of it."""
    from commopt.methods import check_options

    rest = {key: value for key, value in data.items() if key != "method"}
    if isinstance(data["method"], str):
        check_options(data["method"], rest)
        return data["method"], rest
    name, options = read_choice(data["method"])
    for key in rest:
        try:
            check_options(name, [key])
        except ConfigError:
            continue
        raise ConfigError(f"{key}: stands beside the block of {name}, where it has no effect; write it into the block")
    return name, options


def make(
    choice: Choice, model: torch.nn.Module, optimizer: torch.optim.Optimizer, **options: Any
) -> tuple[Any, torch.optim.Optimizer]:
    """The chosen method for this model, and the optimizer that is to step: for frameworks that make the optimizer themselves.

    A gradient or an outer method leaves the optimizer as it is. An update method, as `onebit_adam`, takes its place, with its parameter
    groups and what both know of lr, betas, eps and weight_decay, unless the choice says otherwise; the groups are new dictionaries,
    so schedulers must be made for, or moved to, the new optimizer.
    Raises ConfigError for a wrong choice, and where the method cannot stand in for this kind of optimizer.
    """
    from commopt.methods import build, is_update_method

    name, chosen = read_choice(choice)
    chosen |= options
    if not is_update_method(name):
        return build(name, **chosen), optimizer
    word, kind = name.partition("(")[0], type(optimizer).__name__
    kinds, shared = STANDS_FOR[word]
    if not any(base.__name__ in kinds for base in type(optimizer).__mro__):
        raise ConfigError(
            f"method {name} is an optimizer itself and can stand in for {' or '.join(kinds)}, not for {kind}; use one of those, or "
            f"make it with commopt.build({name!r}, model.named_parameters(), ...) and hand it over as the optimizer"
        )
    for group in optimizer.param_groups:
        for key in ("amsgrad", "maximize", "momentum", "dampening", "nesterov"):
            if group.get(key):
                raise ConfigError(f"method {name}: {key}: {group[key]!r} of {kind} has no counterpart; leave it out")
        if group.get("decoupled_weight_decay") is False and group.get("weight_decay") and "weight_decay" not in chosen:
            raise ConfigError(
                f"method {name}: weight_decay: {group['weight_decay']!r} of {kind} goes into the gradient, and that of {word} off the "
                "parameters, as AdamW's does: use AdamW"
            )
    name_of = {id(p): n for n, p in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        if any(id(p) not in name_of for p in group["params"]):
            raise ConfigError(f"method {name}: the {kind} holds parameters that are not this model's")
        taken = {key: group[key] for key in shared if key in group and key not in chosen}
        taken = {key: float(x) if hasattr(x, "item") else x for key, x in taken.items()}
        groups.append({"params": [(name_of[id(p)], p) for p in group["params"]], **taken})
    method: Any = build(name, groups, **chosen)
    for made, group in zip(method.param_groups, optimizer.param_groups, strict=True):
        made.update({key: x for key, x in group.items() if key == "initial_lr"})  # which schedulers start from
    return method, method
