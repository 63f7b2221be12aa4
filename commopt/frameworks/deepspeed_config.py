"""The communication part of a DeepSpeed configuration: three old optimizers, the "commopt" block, and what neither supports."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from commopt.choice import read_choice
from commopt.errors import ConfigError, check_flag, did_you_mean
from commopt.method import Method
from commopt.methods import METHODS, chosen, resolve
from commopt.optim.update import UpdateMethod
from commopt.options import option_names
from commopt.reading import shown

_ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
_LAMB = {**_ADAM, "max_coeff": 10.0, "min_coeff": 0.01}
_FACTORS = {"freeze_step": 100000, "coeff_beta": 0.9, "factor_max": 4.0, "factor_min": 0.5, "factor_threshold": 0.1}
_ZERO_ONE = {"var_freeze_step": 100000, "var_update_scaler": 16, "local_step_scaler": 32678, "local_step_clipper": 16}
_BACKENDS = ("nccl", "gloo", "mpi", "hccl", "compressed", "ccl")
_WITHOUT_EFFECT = ("bias_correction", "eps_inside_sqrt")
_NOT_NEEDED = ("cuda_aware", "comm_backend_name")
_KERNELS = ("torch_adam", "foreach", "amsgrad", "adam_w_mode")  # they choose DeepSpeed's code for Adam


@dataclass(frozen=True)
class Legacy:
    """An optimizer that DeepSpeed had until 0.19.6: its options, with their defaults there."""

    name: str
    method: str
    optimizer: str  # the one that takes its hyper-parameters now, `settings`
    settings: Mapping[str, Any]
    options: Mapping[str, Any]  # the method's


LEGACY = {
    "onebitadam": Legacy("OneBitAdam", "onebit_adam", "adamw", _ADAM, {"freeze_step": 100000}),
    "zerooneadam": Legacy("ZeroOneAdam", "zero_one_adam", "adamw", _ADAM, _ZERO_ONE),
    "onebitlamb": Legacy("OneBitLamb", "onebit_lamb", "lamb", _LAMB, _FACTORS),
}


@dataclass
class Wanted:
    """What a configuration asks for."""

    method: Method
    optimizer: dict[str, Any] | None = None  # for `make_optimizer`: what a method stands in for, unless passed
    notes: list[str] = field(default_factory=list)  # warnings to log once


def asks(config: Mapping[str, Any]) -> bool:
    """Whether a DeepSpeed configuration names a method at all, valid or not."""
    return "commopt" in config or _kind(config).lower() in LEGACY


def read_wanted(config: Mapping[str, Any], client_optimizer: Any) -> Wanted | None:
    """The method that a DeepSpeed configuration asks for, or None. Raises ConfigError for wrong or contradictory options."""
    kind, params = _kind(config), dict(section(config, "optimizer").get("params") or {})
    legacy = LEGACY.get(kind.lower())
    if (block := chosen({})) and asks(config):  # a launcher's, in place of the configuration's own
        if legacy is None:
            return _read_block(block, kind, params, client_optimizer)
        settings = {key: params.get(key, default) for key, default in legacy.settings.items()}
        return Wanted(resolve(block), {"name": legacy.optimizer, **settings})
    if legacy is None:
        return _read_block(config["commopt"], kind, params, client_optimizer) if "commopt" in config else None
    if "commopt" in config:
        raise ConfigError(
            f"optimizer.type: {kind!r} is commopt's {legacy.method} already: leave out the 'commopt' block, or write "
            f'"commopt": {{"method": "{legacy.method}", ...}} and the optimizer {legacy.optimizer.upper()}'
        )
    if client_optimizer is not None:
        raise ConfigError(
            f"optimizer.type: {kind!r}: an optimizer was passed to initialize() too, and would take its place: leave out one"
        )
    return read_legacy(legacy, params)


def read_legacy(legacy: Legacy, params: Mapping[str, Any]) -> Wanted:
    """What an old optimizer's "params" mean now. Raises ConfigError for unknown options, amsgrad and max_grad_norm."""
    where, known = "optimizer.params", (*legacy.settings, *legacy.options, *_WITHOUT_EFFECT, *_NOT_NEEDED, "amsgrad")
    _refuse(params, where, legacy.name)
    for key in params:
        if key not in known:
            raise ConfigError(f"{where}.{key}: {legacy.name} has no such option{did_you_mean(str(key), known)}")
    for key in (*_WITHOUT_EFFECT, "cuda_aware"):
        check_flag(f"{where}.{key}", params.get(key, False))
    backend = params.get("comm_backend_name", "nccl")
    if backend not in _BACKENDS:
        hint = did_you_mean(str(backend), _BACKENDS)
        raise ConfigError(f"{where}.comm_backend_name: {backend!r} is not a backend{hint}")
    reasons = {
        _WITHOUT_EFFECT: "has no effect, as it had none in DeepSpeed: moments are not corrected for their bias, and eps is added outside "
        f'the root; "commopt": {{"method": "{legacy.method}", "bias_correction": true}} corrects them',
        _NOT_NEEDED: "is accepted but not needed: messages go through the backend that torch.distributed was initialised with, and bits "
        "are packed without cupy or MPI",
    }
    given = {keys: [f"{key}: {shown(params[key])}" for key in keys if key in params] for keys in reasons}
    notes = [f"{legacy.name}: {', '.join(given[keys])} {reason}" for keys, reason in reasons.items() if given[keys]]
    settings = {key: params.get(key, default) for key, default in legacy.settings.items()}
    options = {key: params.get(key, default) for key, default in legacy.options.items()}
    try:
        # the old ones never corrected a bias, whatever bias_correction was
        method = resolve(legacy.method, **options, bias_correction=False)
    except ConfigError as error:
        raise ConfigError(f"optimizer.type: {legacy.name}: {error}") from None
    return Wanted(method, {"name": legacy.optimizer, **settings}, notes)


def _refuse(params: Mapping[str, Any], where: str, who: str) -> None:
    """Raise ConfigError for options of DeepSpeed's optimizers that no update method has."""
    decays = not params.get("adam_w_mode", True) and params.get("weight_decay")
    for key, is_wrong, fix in (
        ("max_grad_norm", "max_grad_norm" in params, 'write "gradient_clipping" at the top level instead'),
        ("amsgrad", params.get("amsgrad"), f"{who} has no AMSGrad variant; leave it out"),
        ("adam_w_mode", decays, f"{who} subtracts weight decay from the parameters, as AdamW does; leave it out"),
    ):
        if is_wrong:
            raise ConfigError(f"{where}.{key}: {shown(params[key])}: {fix}")


def _read_block(block: Any, kind: str, params: dict[str, Any], client_optimizer: Any) -> Wanted:
    if block is None:
        raise ConfigError('commopt: null is not a method; write {"method": ...}, or leave the block out')
    try:
        name, options = read_choice(block)
        known = option_names(METHODS[name].Options) if name in METHODS else options
        for key in options:
            if key == "max_norm" and key not in known:
                raise ConfigError(f'max_norm: {options[key]!r}: write "gradient_clipping" at the top level instead')
            if key in _ADAM and key not in known:
                raise ConfigError(f"{key}: {options[key]!r}: belongs to the optimizer; write it into optimizer.params")
        method = resolve(block)
    except ConfigError as error:
        raise ConfigError(f"commopt: {error}") from None
    if client_optimizer is not None:
        return Wanted(method)
    if not kind:
        what = " or ".join(method.stands_for) if isinstance(method, UpdateMethod) else "any"
        raise ConfigError(
            f"optimizer: is missing: {method.name} needs one ({what}); name one, or pass one to initialize()"
        )
    return _in_place_of(method, kind, params) if isinstance(method, UpdateMethod) else Wanted(method)


def _in_place_of(method: UpdateMethod, kind: str, params: dict[str, Any]) -> Wanted:
    kinds = dict.fromkeys(one.lower() for one in method.stands_for)
    if kind.lower() not in kinds:
        raise ConfigError(
            f"optimizer.type: {kind!r}: {method.name} computes the update itself, and can take the place of {' or '.join(kinds)} only; "
            "name that one"
        )
    _refuse(params, "optimizer.params", method.name)
    settings = {key: value for key, value in params.items() if key not in _KERNELS}
    # bias_correction is an option of DeepSpeed's optimizers and of methods, but not of torch's
    own = {key: settings.pop(key) for key in option_names(type(method).Options) if key in settings}
    made = type(method)(**{**own, **method.given}) if own else method
    name = "adamw" if kind.lower() == "adam" else kind.lower().removeprefix("fused")
    return Wanted(made, {"name": name, "weight_decay": 0.0, **settings})


def settings_facts(parsed: Any) -> dict[str, object]:
    """Facts for `refuse`: settings in a DeepSpeedConfig that methods may not support."""
    raw, stage = parsed._param_dict, int(parsed.zero_optimization_stage)
    half = "fp16" if parsed.float16_config.enabled else "bf16" if parsed.bfloat16_config.enabled else ""
    zero, autocast = section(raw, "zero_optimization"), section(raw, "torch_autocast")
    offloads = [
        key
        for key in ("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_params")
        if (value := zero.get(key)) and (not isinstance(value, Mapping) or value.get("device", "none") != "none")
    ]
    return {
        "deepspeed stage 1": stage == 1,
        "deepspeed stages 2 and 3": stage > 1 and stage,
        "deepspeed offload": offloads and offloads[0],
        "deepspeed amp": section(raw, "amp").get("enabled"),
        "deepspeed hybrid engine": section(raw, "hybrid_engine").get("enabled"),
        "deepspeed autotuning": section(raw, "autotuning").get("enabled"),
        "deepspeed sparse gradients": raw.get("sparse_gradients"),
        "deepspeed sum": str(raw.get("gradient_allreduce_op", "mean")).lower() == "sum",
        "deepspeed deepcompile": section(raw, "compile").get("deepcompile"),
        "deepspeed legacy fusion": section(raw, "optimizer").get("legacy_fusion"),
        "deepspeed autocast": autocast.get("enabled") and parsed.torch_autocast_dtype == torch.float16,
        "deepspeed outer method in half precision": half,
        "deepspeed Lamb in half precision": _kind(raw).lower() == "lamb" and half,
    }


def surprises(parsed: Any, method: str) -> list[str]:
    """Warnings to log: settings that have no effect under a method, and clipping by default."""
    raw, exact = parsed._param_dict, f"{method} computes in float32 and decides what is sent"
    defaults = {"prescale_gradients": False, "communication_data_type": None, "gradient_predivide_factor": 1.0}
    found = [(key, raw[key], exact) for key, default in defaults.items() if raw.get(key, default) != default]
    if section(raw, "comms_logger").get("enabled"):
        found.append(("comms_logger", True, "it counts DeepSpeed's messages only; ours are in engine.commopt.traffic"))
    zero = {key: value for key, value in section(raw, "zero_optimization").items() if key != "stage" and value}
    found += [(f"zero_optimization.{key}", value, "stage 0 does not use it") for key, value in zero.items()]
    told = [f"{key}: {shown(value)} has no effect: {reason}" for key, value, reason in found]
    if "gradient_clipping" not in raw and (norm := float(parsed.gradient_clipping)):
        told.append(
            f"gradient_clipping is not set, and DeepSpeed then clips to a norm of {norm}: write 0.0 to clip nothing"
        )
    return told


def parameter_groups(
    model: torch.nn.Module, model_parameters: Iterable[Any], method: Method
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Parameter groups of what `deepspeed.initialize` takes, without frozen parameters; and masks ("exp_avg_mask") by parameter name.

    Raises ConfigError for parameters that are not the model's.
    """
    name_of = {id(p): name for name, p in model.named_parameters()}
    given = list(model_parameters)
    groups: list[dict[str, Any]] = []
    masks: dict[str, Tensor] = {}
    for number, group in enumerate(given if given and isinstance(given[0], Mapping) else [{"params": given}]):
        where = f"model_parameters: group {number}"
        raw = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        params = [p[1] if isinstance(p, tuple) else p for p in raw]
        for p in params:
            if id(p) not in name_of:
                raise ConfigError(f"{where} holds a parameter of {tuple(p.shape)} that is not this model's")
        params = [p for p in params if p.requires_grad]
        if not params:
            continue
        _refuse(group, where, method.name)
        if group.get("non_freeze") and method.name != "onebit_adam":
            raise ConfigError(f"{where}: non_freeze: true: only OneBitAdam has it; leave it out")
        if group.get("exp_avg_mask") is not None:
            masks |= _split_mask(group["exp_avg_mask"], [(name_of[id(p)], p) for p in params], where)
        kept = {key: value for key, value in group.items() if key not in ("exp_avg_mask", "param_names")}
        groups.append({**kept, "params": params})
    return groups, masks


def _split_mask(mask: Any, named: list[tuple[str, Tensor]], where: str) -> dict[str, Tensor]:
    """A group's "exp_avg_mask" by parameter: it has the parameters' shape, or covers all of them, flattened end to end."""
    mask, sizes = torch.as_tensor(mask), [p.numel() for _, p in named]
    if mask.numel() == sum(sizes):
        parts = torch.split(mask.reshape(-1), sizes)
        return {name: part.reshape(p.shape) for (name, p), part in zip(named, parts, strict=True)}
    if all(p.shape == mask.shape for _, p in named):
        return {name: mask for name, _ in named}
    raise ConfigError(
        f"{where}: exp_avg_mask has {mask.numel()} elements, its parameters {sum(sizes)}: put each masked parameter into a group of its own"
    )


def use_torch_adam(parsed: Any) -> list[str]:
    """Let the engine use torch's Adam if DeepSpeed's would compile a CPU extension, or flatten named parameters; return notes."""
    name, params = str(parsed.optimizer_name or "").lower(), dict(parsed.optimizer_params or {})
    half = parsed.float16_config.enabled or parsed.bfloat16_config.enabled
    if name not in ("adam", "adamw") or params.get("torch_adam") or not (half or not torch.cuda.is_available()):
        return []
    if not params.pop("bias_correction", True):
        raise ConfigError(
            "optimizer.params.bias_correction: false: torch's Adam, which is used here, has no such option; leave it out"
        )
    parsed.optimizer_params = {"weight_decay": 0.0, **params, "torch_adam": True}  # torch's default decay is not 0
    why = "whose wrapper flattens parameters that have names" if half else "which would have to be compiled"
    return [f"{parsed.optimizer_name}: torch's own is used instead of DeepSpeed's, {why}"]


def section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of a configuration; empty if it is missing."""
    value = raw.get(key)
    return value if isinstance(value, Mapping) else {}


def _kind(config: Mapping[str, Any]) -> str:
    return str(section(config, "optimizer").get("type") or "")
