"""A method in a DeepSpeed engine: the exchange is the method's, and everything else stays DeepSpeed's. Nothing happens at import."""

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from commopt.errors import MissingExtra
from commopt.frameworks import deepspeed_config as config
from commopt.frameworks import plain
from commopt.frameworks.deepspeed_engine import EngineRun, Masters, forget_dry_step, hand_over, has_masters, is_half
from commopt.frameworks.deepspeed_groups import PartlyFrozenAdam
from commopt.gossip.loop import OuterMethod
from commopt.groups import Group
from commopt.method import Method
from commopt.methods import resolve
from commopt.optim import make_optimizer
from commopt.optim.update import UpdateMethod
from commopt.run.agree import agree, meeting_group
from commopt.run.checks import Request, check_request, connect, refuse
from commopt.run.run import Run

try:
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine
except ModuleNotFoundError as error:
    if error.name != "deepspeed":
        raise
    raise MissingExtra("commopt.frameworks.deepspeed", "deepspeed") from None

__all__ = ["EngineRun", "attach", "initialize", "install"]

_log = logging.getLogger(__name__)
_PATCHED = "deepspeed.DeepSpeedEngine.__init__"


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize`, with the communication method that the configuration names; the run is `engine.commopt`.

    "optimizer": {"type": "OneBitAdam" | "ZeroOneAdam" | "OneBitLamb", "params": {...}} as DeepSpeed had them until 0.19.6, or
    "commopt": {"method": "dgc", "density": 0.001, ...} with any optimizer; an update method, such as "onebit_adam", stands in for it.
    DeepSpeed itself is unchanged once this returns. Raises on every rank: ConfigError for a wrong option, and AttachError, with the
    reason, for what cannot work.
    """
    original, ops = DeepSpeedEngine.__init__, deepspeed.ops.__compatible_ops__
    had = dict(ops)
    install()
    if not torch.cuda.is_available():
        # only inference uses this extension, for all-reduces in shared memory, and compiling it on a first start takes minutes
        ops["deepspeed_shm_comm"] = False
    try:
        engine, *others = deepspeed.initialize(*args, **kwargs)
    finally:
        DeepSpeedEngine.__init__ = original
        ops.update(had)
    if getattr(engine, "commopt", None) is None and engine.global_rank == 0:
        _log.warning(
            "the configuration names no communication method, and DeepSpeed averages gradients uncompressed: add "
            '"commopt": {"method": ...}, or call commopt.attach(engine, method)'
        )
    return (engine, *others)


def install() -> tuple[str, ...]:
    """Let every new engine read what `initialize` reads, also if Accelerate, the Trainer or Lightning makes it.

    Returns the names of what it has changed in DeepSpeed: nothing the second time. Does not affect an engine whose configuration
    names no method.
    """
    if getattr(DeepSpeedEngine.__init__, "_is_commopts", False):
        return ()
    DeepSpeedEngine.__init__ = _understanding(DeepSpeedEngine.__init__)
    _log.info('%s now reads "commopt" blocks, and OneBitAdam, ZeroOneAdam and OneBitLamb', _PATCHED)
    return (_PATCHED,)


def attach(engine: Any, request: Request) -> Run:
    """Attach a method to an existing engine; the run that this returns is also `engine.commopt`.

    An update method stands in for the engine's Adam, goes on from its moments, and takes its `gradient_clipping` as max_norm.
    """
    forget_dry_step(engine)
    masters, clipping = Masters(engine), float(engine.gradient_clipping())
    own, meeting = replace(request, optimizer=engine.basic_optimizer, max_norm=None), meeting_group(request.group)
    facts = partial(_facts, engine, request)
    checked = check_request("deepspeed", masters, own, meeting, facts, {"gradient_clipping": clipping})
    method = checked.method
    run: Any  # whose handles we add to
    if isinstance(method, OuterMethod):
        run = plain.start(engine.module, checked)
    else:
        if not method.may_be_clipped:
            checked = replace(checked, request=replace(own, max_norm=clipping or None))
        group = request.group if isinstance(request.group, Group) else connect(method=method)
        run = EngineRun(engine, masters, checked, group)
    run._handles.append(hand_over(engine, run))
    engine._commopt_has_read = True  # the block: when the engine was made, or by this attach
    _tell(engine, config.surprises(engine._config, method.name))
    return run  # type: ignore[no-any-return]


def _facts(engine: Any, request: Request, method: Method) -> dict[str, object]:
    """Facts for `refuse`: also engines whose gradients are not one mean over all ranks, or that a method cannot access."""
    given = request.optimizer
    is_stranger = given is not None and given is not engine.optimizer and given is not engine.basic_optimizer
    present, block = getattr(engine, "commopt", None), engine._config._param_dict.get("commopt")
    autotp_size = engine.autotp_size() if hasattr(engine, "autotp_size") else 1
    adam = type(engine.basic_optimizer).__name__
    unread = None if block is None or hasattr(engine, "_commopt_has_read") else resolve(block)
    is_another = unread is not None and (type(unread), unread.options) != (type(method), method.options)
    return {
        **config.settings_facts(engine._config),
        "deepspeed attached": present is not None and present.method.name,
        "deepspeed unread block": is_another and repr(block),
        "deepspeed pipeline": engine.pipeline_parallelism,
        "deepspeed experts": engine.has_moe_layers,
        "deepspeed model parallel": engine.mpu is not None or autotp_size > 1,
        "deepspeed sequence parallel": getattr(engine, "sequence_parallel_size", 1) > 1,
        "deepspeed zenflow": getattr(engine, "zenflow", False),
        "deepspeed version": not hasattr(engine, "_take_model_step") and deepspeed.__version__,
        "deepspeed without an optimizer": engine.basic_optimizer is None,
        "deepspeed flat parameters": is_half(engine) and not has_masters(engine) and type(engine.optimizer).__name__,
        "deepspeed's own Adam": adam in ("FusedAdam", "DeepSpeedCPUAdam") and adam,
        "overlap without backward": request.overlap and "a DeepSpeed engine",
        "deepspeed other optimizer": is_stranger and type(given).__name__,
        "deepspeed max_norm": request.max_norm,
        "deepspeed scaler": request.grad_scaler is not None,
    }


def _tell(engine: Any, notes: list[str]) -> None:
    for note in notes if engine.global_rank == 0 else ():
        _log.warning("%s", note)


# -- engines that are made by a configuration


def _understanding(original: Callable[..., None]) -> Callable[..., None]:
    """The engine's constructor, which also reads the communication method of the configuration.

    It has configuration, parameter names and optimizer together, for `deepspeed.initialize`, Accelerate, the Trainer and Lightning
    alike. Adding optimizers with the old names to torch.optim would not do: DeepSpeed gives them parameters without names, and still
    averages gradients itself.
    """

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        bound = inspect.signature(original).bind(self, *args, **kwargs)
        raw = getattr(bound.arguments.get("config_class"), "_param_dict", None)
        if raw is None or not config.asks(raw):
            original(self, *args, **kwargs)
            return
        told = {"configuration": repr((raw.get("optimizer"), raw.get("commopt")))}
        wanted = agree(meeting_group(None), lambda: (_prepare(bound.arguments), told))
        original(*bound.args, **bound.kwargs)
        self._commopt_has_read = True
        attach(self, Request(wanted.method))
        _tell(self, wanted.notes)

    __init__._is_commopts = True  # type: ignore[attr-defined]
    return __init__


def _prepare(arguments: dict[str, Any]) -> config.Wanted:
    """Read what the configuration asks for; put the optimizer that an update method stands in for into the arguments."""
    parsed, model = arguments["config_class"], arguments["model"]
    wanted = config.read_wanted(parsed._param_dict, arguments.get("optimizer"))
    assert wanted is not None
    method = wanted.method
    is_pipeline = isinstance(model, deepspeed.PipelineModule)
    refuse({"deepspeed pipeline": is_pipeline, **config.settings_facts(parsed)}, method.name, method.kind)
    if wanted.optimizer is None:
        if not isinstance(method, UpdateMethod):
            wanted.notes += config.use_torch_adam(parsed)
        return wanted
    given = arguments.get("model_parameters")
    groups, masks = config.parameter_groups(model, model.parameters() if given is None else given, method)
    arguments["optimizer"] = make_optimizer(wanted.optimizer, groups)
    arguments["model_parameters"] = [p for group in groups for p in group["params"]]
    is_partly_frozen = any(group.get("non_freeze") for group in groups)
    if masks or is_partly_frozen:
        kind = PartlyFrozenAdam if is_partly_frozen else type(method)
        wanted.method = kind(**{**method.given, **({"momentum_mask": masks} if masks else {})})
    return wanted
