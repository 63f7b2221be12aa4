"""A method in a DeepSpeed engine: the exchange is the method's, and everything else stays DeepSpeed's.

Importing this module lets every engine that is made afterwards understand the three optimizers that DeepSpeed 0.19.7 deleted, and a
`"commopt"` block in its configuration, whether it is made by `initialize` here, by `deepspeed.initialize`, or by a framework above it.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch

from commopt.choice import Choice, read_choice
from commopt.errors import AttachError, ConfigError, MissingExtra
from commopt.exchange.mean import Aggregator
from commopt.frameworks.deepspeed_config import (
    LEGACY,
    Wanted,
    check_can_join,
    check_settings,
    check_unread_block,
    clipping_note,
    max_norm_option,
    named_groups,
    read_wanted,
    with_torch_adam,
)
from commopt.frameworks.deepspeed_engine import (
    HELD,
    EngineAttachment,
    Masters,
    Undo,
    check_engine,
    hand_over_outer,
    hold,
    is_half,
)
from commopt.frameworks.deepspeed_groups import PartlyFrozenAdam
from commopt.gossip.loop import OuterLoop
from commopt.groups import Group, Peers
from commopt.methods import build, is_outer_method, is_update_method
from commopt.run.agree import agree, check_group, configuration_of, meeting_group
from commopt.run.base import check_optimizer, check_parameters, connect
from commopt.run.door import made
from commopt.run.outer import OuterAttachment, attach_outer
from commopt.run.stand_in import move_schedulers, refuse_steps, stand_in

try:
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine
except ModuleNotFoundError as error:
    if error.name != "deepspeed":
        raise
    raise MissingExtra("commopt.frameworks.deepspeed", "deepspeed", "deepspeed") from None

__all__ = ["EngineAttachment", "attach", "initialize"]

_log = logging.getLogger(__name__)
_GIVEN_TO, _INSTEAD = "initialize(optimizer=..., lr_scheduler=...)", "engine.step() steps the method"


def initialize(
    args: Any = None,
    model: Any = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize`, with the communication that the configuration names; the attachment is `engine.commopt`.

    "optimizer": {"type": "OneBitAdam" | "ZeroOneAdam" | "OneBitLamb", "params": {...}} as DeepSpeed had them until 0.19.6, or
    "commopt": {"method": "dgc", "density": 0.001, ...} with any optimizer; an update method, as "onebit_adam", takes its place.
    Raises ConfigError for a wrong option, and AttachError, with the reason, for what cannot work; on every rank.
    """
    if not torch.cuda.is_available():
        # DeepSpeed would compile an extension for all-reduces in shared memory, minutes on a first start, which only inference uses
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    found = deepspeed.initialize(
        args=args,
        model=model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        distributed_port=distributed_port,
        mpu=mpu,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        config=config,
        mesh_param=mesh_param,
        config_params=config_params,
    )
    engine = found[0]
    if getattr(engine, "commopt", None) is None and engine.global_rank == 0:
        _log.warning(
            "the configuration names no communication method, and DeepSpeed averages gradients uncompressed: add "
            '"commopt": {"method": ...}, or call commopt.attach(engine, method)'
        )
    return engine, found[1], found[2], found[3]


def attach(
    engine: Any,
    method: Aggregator | OuterLoop | Choice,
    optimizer: torch.optim.Optimizer | None = None,
    group: Group | Peers | None = None,
    *,
    bucket_bytes: int = 25 << 20,
    schedulers: Sequence[Any] | None = None,
) -> EngineAttachment | OuterAttachment:
    """Hand the exchange of an engine that exists over to a method; `engine.commopt` is what it returns.

    method: what `commopt.build` made, or takes. A choice as "onebit_adam" takes the place of the engine's Adam, before the first
    step; one that was built is given to `initialize` as the optimizer. optimizer: the engine's own, or nothing.
    bucket_bytes: at most so much is exchanged at once. schedulers: those that a framework above the engine steps itself.
    Raises AttachError if they do not fit together, on every rank, and ConfigError for a method that does not exist.
    """
    if not isinstance(engine, DeepSpeedEngine):
        raise AttachError(
            f"{type(engine).__name__} is no DeepSpeed engine; pass what deepspeed.initialize returned first"
        )
    present = getattr(engine, "commopt", None)
    if present is not None and present.method is method:
        return present  # type: ignore[no-any-return]
    is_outer = isinstance(method, OuterLoop) or (not isinstance(method, Aggregator) and _is_outer(method))
    meeting = meeting_group(None if isinstance(group, Peers) else group)

    def check() -> tuple[tuple[Any, Any, list[str]], dict[str, Any]]:
        if present is not None:
            raise AttachError(
                f"{present.method.name} is attached to this engine already, by its configuration or an earlier attach; leave one out"
            )
        name = method.name if isinstance(method, Aggregator | OuterLoop) else read_choice(method)[0]
        notes = check_engine(engine, name)
        if not getattr(engine, "_commopt_has_read", False):
            notes += check_unread_block(engine._config._param_dict, method)
        if optimizer is not None and optimizer not in (engine.optimizer, engine.basic_optimizer, method):
            raise AttachError("optimizer: is not this engine's; leave it out, or pass it to deepspeed.initialize")
        if bucket_bytes < 1:
            raise AttachError(f"bucket_bytes: {bucket_bytes!r} is out of range; write a number of bytes above 0")
        if is_outer:
            notes += clipping_note(engine._config)
            return (method, engine.basic_optimizer, notes), {"integration": "deepspeed", "method": name}
        check_group(group)
        chosen, stepping = _chosen(engine, method, schedulers)
        notes += clipping_note(engine._config, chosen if stepping is chosen else None)
        seen = Masters(engine)
        named = check_parameters(seen, chosen, check_optimizer(chosen, None if stepping is chosen else stepping))
        clipping = float(engine.gradient_clipping())
        return (chosen, stepping, notes), configuration_of(
            "deepspeed", chosen, named, stepping, bucket_bytes=bucket_bytes, gradient_clipping=clipping
        )

    chosen, stepping, notes = agree(meeting, check)
    attachment: Any
    if is_outer:
        attachment = attach_outer(engine.module, chosen, stepping, group, without_effect={})
        attachment._handles += hand_over_outer(engine, attachment)
    else:
        replaced = None if stepping is engine.basic_optimizer else _take_place(engine, chosen, schedulers)
        attachment = EngineAttachment(engine, chosen, stepping, group or connect(), bucket_bytes)  # type: ignore[arg-type]
        if replaced is not None:
            attachment._handles.append(replaced)
        HELD.pop(id(chosen), None)
    engine.commopt, engine._commopt_has_read = attachment, True
    attachment._handles.append(Undo(lambda: delattr(engine, "commopt")))
    for note in notes if engine.global_rank == 0 else ():
        _log.warning("%s", note)
    return attachment  # type: ignore[no-any-return]


def _is_outer(choice: Any) -> bool:
    try:
        return is_outer_method(read_choice(choice)[0])
    except ConfigError:
        return False  # which is told where all ranks hear of it


def _chosen(engine: Any, method: Any, schedulers: Sequence[Any] | None) -> tuple[Any, Any]:
    """The method, and the optimizer that steps: the engine's, or the update method that is to take its place."""
    basic, half = engine.basic_optimizer, is_half(engine)
    if isinstance(basic, Aggregator) and method is not basic:
        raise AttachError(f"the engine's optimizer is {basic.name} already; attach(engine, engine.basic_optimizer)")
    if not hasattr(engine.optimizer, "fp32_groups") and half:
        raise AttachError(
            f"{type(engine.optimizer).__name__} keeps all parameters in one flat tensor, where a method needs them by name: "
            'write "torch_adam": true into optimizer.params'
        )
    if isinstance(method, Aggregator):
        if isinstance(method, torch.optim.Optimizer) and method is not basic:
            raise AttachError(
                f"{method.name} is an optimizer itself, and the engine steps its own {type(basic).__name__}: give it to "
                f"initialize(optimizer=...), or attach by name, attach(engine, {method.name!r})"
            )
        return method, basic
    if not is_update_method(read_choice(method)[0]):
        return made(method, engine.module, basic), basic
    if half and engine.global_steps == 0:
        basic.state.clear()  # DeepSpeed has let it make a step on zeros, for its state
    more = max_norm_option(engine._config, read_choice(method)[1])
    where = _GIVEN_TO if schedulers is None else "prepare()"
    made_of = stand_in(method, Masters(engine), basic, _schedulers(engine, schedulers), where, **more)
    return made_of, made_of


def _schedulers(engine: Any, others: Sequence[Any] | None) -> list[Any]:
    return [one for one in (engine.lr_scheduler, *(others or ())) if one is not None]


def _take_place(engine: Any, method: Any, schedulers: Sequence[Any] | None) -> Undo:
    """Let the engine step an update method instead of the optimizer that it was made with."""
    old, groups = engine.basic_optimizer, engine.basic_optimizer.param_groups
    back = move_schedulers(_schedulers(engine, schedulers), old, method)
    refusal = refuse_steps(old, method.name, _INSTEAD)
    if is_half(engine):
        engine.optimizer.optimizer = method
    else:
        engine.optimizer = method
    engine.basic_optimizer = engine.client_optimizer = method
    old.param_groups = method.param_groups  # a rate that is set in the old one's groups still counts

    def undo() -> None:
        back()
        refusal.remove()
        old.param_groups = groups

    return Undo(undo)


# -- engines that are made after this module has been imported


def _prepare(bound: dict[str, Any]) -> Wanted:
    """What the engine's configuration or client optimizer wants; puts an update method into the place of the optimizer."""
    parsed, model = bound["config_class"], bound["model"]
    client: Any = bound.get("optimizer")
    raw = parsed._param_dict
    wanted = read_wanted(raw, client)
    if isinstance(client, Aggregator):
        if wanted is not None:
            raise ConfigError(f"commopt: the optimizer that was passed is {client.name} already; leave the block out")
        wanted = Wanted(client.name, {})
    if wanted is None:
        raise ConfigError('commopt: null is no method; write {"method": ...}, or leave the block out')
    if isinstance(model, deepspeed.PipelineModule):
        raise AttachError(
            f"{wanted.method} does not go with a pipeline engine, whose stages exchange in their own schedule"
        )
    check_settings(parsed, raw, wanted.method)
    check_can_join(wanted.method)
    if not is_update_method(wanted.method):
        _use_torch_adam(parsed, wanted)
        return wanted
    if not isinstance(client, Aggregator):
        wanted.options |= max_norm_option(parsed, wanted.options)
        client = _update_method(wanted, bound)
    elif raw.get("gradient_clipping") and client.max_norm != parsed.gradient_clipping:
        raise ConfigError(
            f"gradient_clipping: {parsed.gradient_clipping!r}: would clip a copy of what {client.name} has exchanged; build it with "
            f"max_norm={parsed.gradient_clipping!r}"
        )
    else:
        hold(client)
    bound["optimizer"] = client
    return wanted


def _update_method(wanted: Wanted, bound: dict[str, Any]) -> Any:
    model, client = bound["model"], bound.get("optimizer")
    parameters = list(bound.get("model_parameters") or model.parameters())
    bound["model_parameters"] = parameters
    if client is None:
        groups = named_groups(model, parameters, wanted)
        try:
            method: Any
            if any(group.get("non_freeze") for group in groups):
                method = PartlyFrozenAdam(groups, **wanted.options)
            else:
                method = build(wanted.method, groups, **wanted.options)
        except ConfigError as error:
            where = f"optimizer.type: {wanted.legacy.name}" if wanted.legacy else "commopt"
            raise ConfigError(f"{where}: {error}") from None
        hold(method)
        return method
    client = client if isinstance(client, torch.optim.Optimizer) else client(parameters)
    schedulers = [bound["lr_scheduler"]] if bound.get("lr_scheduler") is not None else []
    method = stand_in({"name": wanted.method, **wanted.options}, model, client, schedulers, _GIVEN_TO)
    hold(method)
    move_schedulers(schedulers, client, method)
    refuse_steps(client, wanted.method, _INSTEAD)
    return method


def _use_torch_adam(parsed: Any, wanted: Wanted) -> None:
    """Let the engine use torch's Adam where DeepSpeed's would compile an extension for the CPU, or flatten what has names."""
    name = str(parsed.optimizer_name or "").lower()
    half = parsed.float16_config.enabled or parsed.bfloat16_config.enabled
    params = parsed.optimizer_params or {}
    if name not in ("adam", "adamw") or params.get("torch_adam") or not (half or not torch.cuda.is_available()):
        return
    parsed.optimizer_params = with_torch_adam(params)
    why = "whose wrapper flattens parameters that have names" if half else "which is an extension to be compiled"
    wanted.notes.append(f"{parsed.optimizer_name}: torch's own is used instead of DeepSpeed's, {why}")


def _make_engine(original: Callable[..., None], engine: Any, *args: Any, **kwargs: Any) -> None:
    bound = inspect.signature(original).bind(engine, *args, **kwargs).arguments
    extra = bound.pop("kwargs", {})
    raw = getattr(bound.get("config_class"), "_param_dict", None)
    if raw is None or not _asks(raw, bound.get("optimizer")):
        original(engine, *args, **kwargs)
        return
    told: Any = {"optimizer": raw.get("optimizer"), "commopt": raw.get("commopt")}
    try:
        wanted = agree(meeting_group(None), lambda: (_prepare(bound), {"configuration": repr(told)}))
        original(**bound, **extra)
        engine._commopt_has_read = True
        client = bound.get("optimizer")
        attach(engine, client if isinstance(client, Aggregator) else {"name": wanted.method, **wanted.options})
    finally:
        HELD.pop(id(bound.get("optimizer")), None)
    for note in wanted.notes if engine.global_rank == 0 else ():
        _log.warning("%s", note)


def _asks(raw: Mapping[str, Any], client: Any) -> bool:
    section = raw.get("optimizer")
    kind = str(section.get("type", "")).lower() if isinstance(section, Mapping) else ""
    return "commopt" in raw or kind in LEGACY or isinstance(client, Aggregator)


class _MadeByEngine:
    """What stands under an old name on torch.optim, where DeepSpeed looks for optimizers that it does not know."""

    def __init__(self, name: str, method: str) -> None:
        self.__name__, self._method = name, method

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfigError(
            f"torch.optim.{self.__name__} is for DeepSpeed configurations: its engine hands the exchange over. Elsewhere use "
            f"commopt.build({self._method!r}, model.named_parameters(), ...) and commopt.attach"
        )


def _install() -> None:
    """Teach DeepSpeed's engine, once, what its configurations may say again.

    An optimizer on torch.optim alone would not do: DeepSpeed gives it parameters without names, goes on averaging gradients
    itself, and under fp16 lets it step before anything was attached. The engine's constructor is where configuration, names and
    optimizer are together, for `deepspeed.initialize`, Accelerate, the Trainer and Lightning alike, in 0.19.6 as in 0.19.8. An
    engine that asks for nothing of commopt is made as ever.
    """
    for legacy in LEGACY.values():
        setattr(torch.optim, legacy.name, _MadeByEngine(legacy.name, legacy.method))
    original, is_supported = DeepSpeedEngine.__init__, DeepSpeedEngine._is_supported_optimizer
    if getattr(original, "_is_commopts", False):
        return

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        _make_engine(original, self, *args, **kwargs)

    __init__._is_commopts = True  # type: ignore[attr-defined]
    DeepSpeedEngine.__init__ = __init__
    DeepSpeedEngine._is_supported_optimizer = lambda self, name: name.lower() in LEGACY or is_supported(self, name)


_install()
