"""What a DeepSpeed configuration says of communication: the three old optimizers, the "commopt" block, and what goes with neither."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from commopt.choice import STANDS_FOR, read_choice
from commopt.errors import AttachError, ConfigError, check_flag, did_you_mean
from commopt.exchange.mean import Aggregator
from commopt.gossip.loop import OuterLoop
from commopt.methods import check_options, is_outer_method, is_update_method

_SHARED = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
_LAMB = {
    "max_coeff": 10.0,
    "min_coeff": 0.01,
    "coeff_beta": 0.9,
    "factor_max": 4.0,
    "factor_min": 0.5,
    "factor_threshold": 0.1,
}
_ZERO_ONE = {"var_freeze_step": 100000, "var_update_scaler": 16, "local_step_scaler": 32678, "local_step_clipper": 16}
_BACKENDS = ("nccl", "gloo", "mpi", "hccl", "compressed", "ccl")
_WITHOUT_EFFECT = ("bias_correction", "eps_inside_sqrt")
_EXPLAINED = ("cuda_aware", "comm_backend_name")


@dataclass(frozen=True)
class Legacy:
    """An optimizer that DeepSpeed had until 0.19.6, as its JSON knew it. defaults: its knobs, with their values there."""

    name: str
    method: str
    defaults: Mapping[str, Any]


LEGACY = {
    legacy.name.lower(): legacy
    for legacy in (
        Legacy("OneBitAdam", "onebit_adam", {**_SHARED, "freeze_step": 100000}),
        Legacy("ZeroOneAdam", "zero_one_adam", {**_SHARED, **_ZERO_ONE}),
        Legacy("OneBitLamb", "onebit_lamb", {**_SHARED, "freeze_step": 100000, **_LAMB}),
    )
}


@dataclass
class Wanted:
    """The method that a configuration asks for. legacy: by which old name. notes: what is to be logged about it, once."""

    method: str
    options: dict[str, Any]
    legacy: Legacy | None = None
    notes: list[str] = field(default_factory=list)


def read_wanted(config: Mapping[str, Any], client_optimizer: Any) -> Wanted | None:
    """The method that a DeepSpeed configuration asks for, or None. Raises ConfigError for a wrong option, or two that contradict."""
    block = config.get("commopt")
    section = config.get("optimizer") or {}
    kind = str(section.get("type", "")) if isinstance(section, Mapping) else ""
    legacy = LEGACY.get(kind.lower())
    if legacy is None and block is None:
        return None
    if legacy is None:
        return _read_block(block, section, client_optimizer)
    if block is not None:
        raise ConfigError(
            f"optimizer.type: {kind!r} is commopt's {legacy.method} already: leave out the 'commopt' block, or write "
            f'"commopt": {{"method": "{legacy.method}", ...}} and the optimizer Adam or Lamb'
        )
    if client_optimizer is not None:
        raise ConfigError(
            f"optimizer.type: {kind!r}: an optimizer was passed to initialize() too, and would take its place: leave out one"
        )
    return read_legacy(legacy, section.get("params") or {})


def read_legacy(legacy: Legacy, params: Mapping[str, Any]) -> Wanted:
    """What an old optimizer's "params" mean now. Raises ConfigError for unknown knobs, amsgrad and max_grad_norm."""
    where = "optimizer.params"
    if "max_grad_norm" in params:
        raise ConfigError(
            f"{where}.max_grad_norm: {params['max_grad_norm']!r}: had no effect in {legacy.name}; "
            f'write "gradient_clipping": {params["max_grad_norm"]!r} at the top level of the configuration instead'
        )
    known = (*legacy.defaults, *_WITHOUT_EFFECT, *_EXPLAINED, "amsgrad")
    for key in params:
        if key not in known:
            raise ConfigError(f"{where}.{key}: {legacy.name} has no such option{did_you_mean(str(key), known)}")
    if params.get("amsgrad"):
        raise ConfigError(f"{where}.amsgrad: true: {legacy.name} has no AMSGrad variant; leave it out")
    for key in (*_WITHOUT_EFFECT, "cuda_aware"):
        if key in params:
            _check(where, key, params[key])
    backend = params.get("comm_backend_name", "nccl")
    if backend not in _BACKENDS:
        hint = did_you_mean(str(backend), _BACKENDS)
        raise ConfigError(f"{where}.comm_backend_name: {backend!r} is no backend{hint}")
    options = {key: params.get(key, default) for key, default in legacy.defaults.items()}
    notes = []
    without = [f"{key}: {_json(params[key])}" for key in _WITHOUT_EFFECT if key in params]
    if without:
        notes.append(
            f"{legacy.name}: {', '.join(without)} has no effect, as it had none in DeepSpeed: moments are not corrected for their bias, "
            f'and eps is added outside the root; "commopt": {{"method": "{legacy.method}", "bias_correction": true}} corrects them'
        )
    explained = [f"{key}: {_json(params[key])}" for key in _EXPLAINED if key in params]
    if explained:
        notes.append(
            f"{legacy.name}: {', '.join(explained)} is accepted and not needed: messages go through the backend that torch.distributed was "
            "initialised with, and bits are packed without cupy or MPI"
        )
    # the old ones never corrected a bias, whatever the knob said
    return Wanted(legacy.method, {**options, "bias_correction": False}, legacy, notes)


def _read_block(block: Any, section: Mapping[str, Any], client_optimizer: Any) -> Wanted:
    try:
        method, options = read_choice(block)
        check_options(method, options)
    except ConfigError as error:
        raise ConfigError(f"commopt: {error}") from None
    wanted = Wanted(method, options)
    if client_optimizer is not None or not is_update_method(method):
        if client_optimizer is None and not section.get("type"):
            raise ConfigError(
                f"optimizer: is missing: {method} goes beside an optimizer; name one, or pass one to initialize()"
            )
        return wanted
    if section.get("type"):
        wanted.options = {**_taken_over(method, str(section["type"]), section.get("params") or {}, options), **options}
    return wanted


def _taken_over(method: str, kind: str, params: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What an update method takes from the optimizer of the configuration whose place it takes."""
    kinds = tuple(dict.fromkeys(one.lower() for one in STANDS_FOR[method.partition("(")[0]][0]))
    if kind.lower() not in kinds:
        raise ConfigError(
            f"optimizer.type: {kind!r}: {method} is an optimizer itself and can take the place of {' or '.join(kinds)} only; "
            "name that one, or leave the optimizer out and put its options into the 'commopt' block"
        )
    taken = {}
    for key, value in params.items():
        if key == "max_grad_norm":
            raise ConfigError(f'optimizer.params.max_grad_norm: {value!r}: write "gradient_clipping" at the top level')
        if key == "amsgrad" and value:
            raise ConfigError(f"optimizer.params.amsgrad: true: {method} has no AMSGrad variant; leave it out")
        if key == "adam_w_mode" and not value and (params.get("weight_decay") or chosen.get("weight_decay")):
            raise ConfigError(
                f"optimizer.params.adam_w_mode: false: {method} takes weight decay off the parameters, as AdamW does; leave it out"
            )
        if key in ("torch_adam", "foreach", "amsgrad", "adam_w_mode"):
            continue  # which kernel computes Adam, and what has been refused above
        try:
            check_options(method, [key])
        except ConfigError as error:
            raise ConfigError(f"optimizer.params: {error}") from None
        taken[key] = value
    return taken


def check_settings(parsed: Any, raw: Mapping[str, Any], method: str) -> list[str]:
    """What is to be logged of settings without effect under a method. Raises AttachError, with the reason, for what cannot work.

    parsed: DeepSpeed's DeepSpeedConfig of `raw`.
    """
    outer = is_outer_method(method)
    stage = int(parsed.zero_optimization_stage)
    if stage == 1:
        raise AttachError(
            f"zero_optimization.stage: 1: after each step it sends all updated parameters uncompressed, which {method} cannot take over, "
            'and its own reduction cannot be switched off; write "stage": 0'
        )
    if stage > 1:
        raise AttachError(
            f"zero_optimization.stage: {stage}: gradients are split between ranks during backward, so that no rank has one for {method} to "
            'exchange; write "stage": 0, or use FSDP2 with commopt.frameworks.fsdp'
        )
    zero = raw.get("zero_optimization")
    zero = zero if isinstance(zero, Mapping) else {}
    for key in ("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_params"):
        value = zero.get(key)
        if value and (not isinstance(value, Mapping) or value.get("device", "none") != "none"):
            raise AttachError(
                f"zero_optimization.{key}: offloading belongs to ZeRO's stages, of which {method} has none"
            )
    for key, reason in (
        ("amp", "Apex scales the loss on its own; use fp16 or bf16"),
        ("hybrid_engine", "it has not been made to work with commopt"),
        ("autotuning", "it restarts the training with other settings"),
    ):
        if isinstance(raw.get(key), Mapping) and raw[key].get("enabled"):
            raise AttachError(f"{key}.enabled: true: {reason}")
    if raw.get("sparse_gradients"):
        raise AttachError("sparse_gradients: true: sparse gradients are not supported; leave it out")
    if str(raw.get("gradient_allreduce_op", "mean")).lower() == "sum":
        raise AttachError(
            f"gradient_allreduce_op: 'sum': {method} averages; scale the loss by the number of ranks instead"
        )
    if _section(raw, "compile").get("deepcompile"):
        raise AttachError("compile.deepcompile: true: it reduces gradients in its compiled graph; leave it out")
    if _section(raw, "optimizer").get("legacy_fusion"):
        raise AttachError("optimizer.legacy_fusion: true: gradients then bypass the optimizer's step; leave it out")
    autocast = _section(raw, "torch_autocast")
    if autocast.get("enabled") and parsed.torch_autocast_dtype == torch.float16:
        raise AttachError("torch_autocast.dtype: float16: each rank's scaler would decide alone; use bfloat16, or fp16")
    half = "fp16" if parsed.float16_config.enabled else "bf16" if parsed.bfloat16_config.enabled else None
    if outer and half:
        raise AttachError(
            f"{half}.enabled: true: {method} averages parameters, of which DeepSpeed then has two copies; train in fp32, or with "
            "torch_autocast"
        )
    if half and str(_section(raw, "optimizer").get("type", "")).lower() == "lamb" and not is_update_method(method):
        raise AttachError(
            f"optimizer.type: 'Lamb' under {half}: DeepSpeed's wrapper hands it gradients past its step; use onebit_lamb"
        )
    return _without_effect(raw, zero, method)


def _without_effect(raw: Mapping[str, Any], zero: Mapping[str, Any], method: str) -> list[str]:
    exact = f"{method} computes in float32 and decides what travels"
    found = []
    if raw.get("prescale_gradients"):
        found.append(("prescale_gradients", raw["prescale_gradients"], exact))
    if raw.get("gradient_predivide_factor", 1.0) != 1.0:
        found.append(("gradient_predivide_factor", raw["gradient_predivide_factor"], exact))
    if raw.get("communication_data_type") is not None:
        found.append(("communication_data_type", raw["communication_data_type"], exact))
    if _section(raw, "comms_logger").get("enabled"):
        found.append(
            ("comms_logger", True, "it sees DeepSpeed's messages only; ours are in engine.commopt.group.traffic")
        )
    for key, value in zero.items():
        if key != "stage" and value:
            found.append((f"zero_optimization.{key}", value, "stage 0 has no use for it"))
    return [f"{key}: {_json(value)} has no effect: {reason}" for key, value, reason in found]


def max_norm_option(parsed: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """An update method's max_norm: gradients are clipped before they become momentum. Raises ConfigError for two norms."""
    clipping, max_norm = parsed.gradient_clipping, options.get("max_norm")
    if max_norm is not None and "gradient_clipping" in parsed._param_dict and max_norm != clipping:
        raise ConfigError(f"commopt.max_norm: {max_norm!r} is not the gradient_clipping, {clipping!r}; leave one out")
    return {"max_norm": float(clipping)} if max_norm is None and clipping else {}


def clipping_note(parsed: Any, update_method: Any = None) -> list[str]:
    """What is to be logged where the configuration leaves the clipping to a default."""
    if "gradient_clipping" in parsed._param_dict:
        return []
    default = float(parsed.gradient_clipping)
    if update_method is None or update_method.max_norm == default:
        return [
            f"gradient_clipping is not set, and DeepSpeed then clips to a norm of {default}: write 0.0 to clip nothing"
        ]
    norm = update_method.max_norm
    clips = f"clips to its own max_norm={norm}" if norm else "clips nothing, for it has no max_norm"
    return [
        f"gradient_clipping is not set, and {update_method.name} {clips}: DeepSpeed's default of {default} has no effect"
    ]


def check_can_join(method: str) -> None:
    """Raise AttachError for an outer method in an engine that a Trainer of transformers makes, which joins no rounds."""
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    frame = inspect.currentframe() if trainer is not None and is_outer_method(method) else None
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), trainer):  # type: ignore[arg-type]
            raise AttachError(
                f"{method} in the DeepSpeed configuration of a Trainer, which has no place for attachment.join() and finish(): leave "
                f"`deepspeed=` out, and give CommoptCallback({method!r}) of commopt.frameworks.transformers to the Trainer"
            )
        frame = frame.f_back


def check_unread_block(raw: Mapping[str, Any], method: Any) -> list[str]:
    """What is to be logged of a "commopt" block that nobody read when the engine was made, and that `method` now stands for.

    Raises AttachError where the block names another method, or other options.
    """
    if "commopt" not in raw:
        return []
    why = "commopt.frameworks.deepspeed was imported after the engine was made, or not at all"
    wanted = read_choice(raw["commopt"])
    given = (method.name, wanted[1]) if isinstance(method, Aggregator | OuterLoop) else read_choice(method)
    if given != wanted:
        raise AttachError(
            f"commopt: {raw['commopt']!r} in the configuration has had no effect ({why}), and is not what is attached now, {given!r}: "
            "leave one out"
        )
    return [f"commopt: the block of the configuration had no effect until now: {why}. Import it first"]


def named_groups(model: torch.nn.Module, model_parameters: Iterable[Any], own: Wanted | None) -> list[dict[str, Any]]:
    """Parameter groups of (name, parameter) from what `deepspeed.initialize` takes; frozen parameters are left out.

    Masks ("exp_avg_mask") go into own.options["momentum_mask"]. Raises ConfigError for parameters that are not the model's.
    """
    name_of = {id(p): name for name, p in model.named_parameters()}
    given = list(model_parameters)
    given = given if given and isinstance(given[0], Mapping) else [{"params": given}]
    groups, masks = [], {}
    for number, group in enumerate(given):
        raw = group["params"]
        params = [raw] if isinstance(raw, Tensor) else list(raw)
        params = [p[1] if isinstance(p, tuple) else p for p in params]
        for p in params:
            if id(p) not in name_of:
                raise ConfigError(
                    f"model_parameters: group {number} holds a parameter of {tuple(p.shape)} that is not this model's"
                )
        params = [p for p in params if p.requires_grad]
        if not params:
            continue
        kept = {key: value for key, value in group.items() if key not in ("params", "exp_avg_mask", "param_names")}
        for key in ("amsgrad", "max_grad_norm"):
            if kept.get(key):
                raise ConfigError(
                    f"model_parameters: group {number}: {key}: {kept[key]!r} is not supported; leave it out"
                )
        if kept.get("non_freeze") and (own is None or own.method != "onebit_adam"):
            raise ConfigError(
                f"model_parameters: group {number}: non_freeze: true: only OneBitAdam has it; leave it out"
            )
        if group.get("exp_avg_mask") is not None:
            masks.update(_split_mask(group["exp_avg_mask"], [(name_of[id(p)], p) for p in params], number))
        groups.append({**kept, "params": [(name_of[id(p)], p) for p in params]})
    if masks and own is not None:
        own.options["momentum_mask"] = {**masks, **own.options.get("momentum_mask", {})}
    return groups


def _split_mask(mask: Any, named: list[tuple[str, Tensor]], number: int) -> dict[str, Tensor]:
    """A group's "exp_avg_mask" by parameter: one of the parameter's shape, or flattened, of all of them end to end."""
    mask = torch.as_tensor(mask)
    if mask.numel() == sum(p.numel() for _, p in named):
        parts = torch.split(mask.reshape(-1), [p.numel() for _, p in named])
        return {name: part.reshape(p.shape) for (name, p), part in zip(named, parts, strict=True)}
    if all(p.shape == mask.shape for _, p in named):
        return {name: mask for name, _ in named}
    raise ConfigError(
        f"model_parameters: group {number}: exp_avg_mask has {mask.numel()} elements, its parameters "
        f"{sum(p.numel() for _, p in named)}: put each masked parameter into a group of its own"
    )


def with_torch_adam(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of DeepSpeed's Adam for torch's own, whose weight decay is not 0 by default."""
    own = {"weight_decay": 0.0, **params, "torch_adam": True}
    if not own.pop("bias_correction", True):
        raise ConfigError(
            "optimizer.params.bias_correction: false: torch's Adam, which is used here, has no such option; leave it out"
        )
    return own


def _check(where: str, key: str, value: Any) -> None:
    try:
        check_flag(key, value)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from None


def _section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key)
    return value if isinstance(value, Mapping) else {}


def _json(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
