"""What is refused, with what, why, and what to do instead: one table, from which the errors and a page of the docs come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from commopt.errors import AttachError
from commopt.method import Kind

_EVERY: tuple[Kind, ...] = ("gradient", "update", "outer")
_EVERY_STEP: tuple[Kind, ...] = ("gradient", "update")


@dataclass(frozen=True)
class Refusal:
    """One combination that cannot work.

    fact: by which a framework reports it. framework: where it is looked for. what, why, instead: the error; {method} is the
        method's name, and {detail} what the framework found. kinds: of methods that it concerns.
    """

    fact: str
    framework: str
    what: str
    why: str
    instead: str
    kinds: tuple[Kind, ...] = _EVERY

    def text(self, method: str, detail: object = "") -> str:
        """The error's text."""
        return f"{self.what}: {self.why}; {self.instead}".format(method=method, detail=detail)


REFUSALS = (
    Refusal(
        "max_norm of a private method",
        "any",
        "max_norm with {method}",
        "it clips each sample, or each rank's gradient, by itself",
        "leave max_norm out, and use the method's clip_norm",
    ),
    Refusal(
        "outer method and max_norm with a scaler",
        "any",
        "grad_scaler with {method}",
        "it exchanges no gradients, and a scaler skips steps on each rank alone",
        "leave grad_scaler out, and scale the loss as ever",
        kinds=("outer",),
    ),
    Refusal(
        "peers for a synchronous method",
        "any",
        "group: Peers with {method}",
        "it exchanges in every step, which needs a group with all ranks",
        "pass a Group, or use an outer method",
        kinds=_EVERY_STEP,
    ),
    Refusal(
        "overlap without backward",
        "any",
        "overlap=True with {detail}",
        "there is no exchange during backward",
        "leave overlap out",
    ),
    Refusal(
        "overlap with a joint decision",
        "ddp",
        "overlap=True with {detail}",
        "it needs the gradients of all buckets at once",
        "leave overlap out, or write overlap=False",
        kinds=_EVERY_STEP,
    ),
    Refusal(
        "plain scaler",
        "plain",
        "grad_scaler on several ranks without DDP",
        "GradScaler decides on each rank alone before the exchange",
        "wrap the model in DistributedDataParallel",
        kinds=_EVERY_STEP,
    ),
    Refusal(
        "ddp around an outer method",
        "ddp",
        "{method} on a DistributedDataParallel model",
        "DDP averages gradients in every step, and {method} is there to do without that",
        "attach to the model itself",
        kinds=("outer",),
    ),
    Refusal(
        "ddp mixed precision",
        "ddp",
        "DistributedDataParallel(mixed_precision=...)",
        "DDP casts gradients around the hook",
        "use torch.autocast instead",
    ),
    Refusal(
        "ddp hook",
        "ddp",
        "a DDP model with a communication hook",
        "DDP takes only one",
        "attach before registering others, and leave DDP's own out",
    ),
    Refusal(
        "ddp detached",
        "ddp",
        "a DDP model whose run was closed",
        "it keeps its hook for good",
        "make a new DistributedDataParallel(model.module), and attach to that",
    ),
    Refusal(
        "ddp other ranks",
        "ddp",
        "group: {detail}",
        "it has other ranks than DDP's own process group",
        "leave group out",
    ),
    Refusal(
        "ddp shared group",
        "ddp",
        "group: DDP's own process group",
        "it carries {detail} at the same time, in another order on each rank",
        "leave group out, or pass one over a new process group",
    ),
    Refusal(
        "compiled ddp",
        "ddp",
        "torch.compile around a DDP model",
        "the hook belongs to the DDP model inside",
        "attach to the DDP model first, then compile it",
    ),
    Refusal(
        "deepspeed attached",
        "deepspeed",
        "{method} on an engine with a method",
        "{detail} is attached to this engine already, by its configuration or an earlier attach",
        "leave one out, or close() engine.commopt first",
    ),
    Refusal(
        "deepspeed unread block",
        "deepspeed",
        'attach(engine, {method!r}) beside another "commopt" block',
        "{detail} in the configuration has had no effect, because commopt.deepspeed.install() was not called before the engine was made",
        "leave the block out, or attach what it names",
    ),
    Refusal(
        "deepspeed stage 1",
        "deepspeed",
        "zero_optimization.stage: 1 with {method}",
        "after each step ZeRO sends all updated parameters uncompressed, and its own reduction cannot be switched off",
        'write "stage": 0',
    ),
    Refusal(
        "deepspeed stages 2 and 3",
        "deepspeed",
        "zero_optimization.stage: {detail} with {method}",
        "gradients are split between ranks during backward, and no rank has a whole one to exchange",
        'write "stage": 0, or use FSDP2',
    ),
    Refusal(
        "deepspeed offload",
        "deepspeed",
        "zero_optimization.{detail} with {method}",
        "offloading belongs to ZeRO's stages 1 to 3, which no method goes with",
        "leave it out",
    ),
    Refusal(
        "deepspeed pipeline",
        "deepspeed",
        "{method} on a pipeline engine",
        "its stages exchange in their own schedule",
        "train without pipeline parallelism",
    ),
    Refusal(
        "deepspeed experts",
        "deepspeed",
        "{method} on a mixture of experts",
        "experts' gradients are averaged over other groups",
        "train a model without DeepSpeed's MoE layers",
    ),
    Refusal(
        "deepspeed model parallel",
        "deepspeed",
        "{method} with tensor parallelism (an mpu, or autotp_size)",
        "ranks hold different parameters",
        "train without it",
    ),
    Refusal(
        "deepspeed sequence parallel",
        "deepspeed",
        "{method} with sequence parallelism",
        "ranks share a batch",
        "train without it",
    ),
    Refusal(
        "deepspeed zenflow",
        "deepspeed",
        "{method} with ZenFlow",
        "it splits the optimizer's step",
        "leave zenflow out",
    ),
    Refusal(
        "deepspeed version",
        "deepspeed",
        "{method} in DeepSpeed {detail}",
        "its engine steps in an unknown way",
        "install deepspeed 0.19.6 to 0.19.8",
    ),
    Refusal(
        "deepspeed without an optimizer",
        "deepspeed",
        "{method} on an engine without an optimizer",
        "there is no step at which it could exchange",
        "name one in the configuration, or pass one to initialize()",
    ),
    Refusal(
        "deepspeed other optimizer",
        "deepspeed",
        "attach(engine, {method!r}, {detail})",
        "this optimizer is not the engine's",
        "leave it out, or pass it to initialize()",
    ),
    Refusal(
        "deepspeed flat parameters",
        "deepspeed",
        "{method} under {detail}",
        "this wrapper keeps all parameters in one flat tensor, and a method needs them by name",
        'write "torch_adam": true into optimizer.params',
        kinds=_EVERY_STEP,
    ),
    Refusal(
        "deepspeed's own Adam",
        "deepspeed",
        "{method} in place of {detail}",
        "it takes its settings from torch's Adam or AdamW",
        'write "torch_adam": true into optimizer.params',
        kinds=("update",),
    ),
    Refusal(
        "deepspeed max_norm",
        "deepspeed",
        "max_norm={detail} with a DeepSpeed engine",
        "an engine clips to its gradient_clipping, and hands it to update methods",
        'write "gradient_clipping": {detail} into the configuration',
    ),
    Refusal(
        "deepspeed scaler",
        "deepspeed",
        "grad_scaler with a DeepSpeed engine",
        "an engine scales the loss itself",
        "leave grad_scaler out",
    ),
    Refusal(
        "deepspeed sum",
        "deepspeed",
        "gradient_allreduce_op: 'sum' with {method}",
        "methods average",
        "scale the loss by the number of ranks instead",
    ),
    Refusal(
        "deepspeed amp",
        "deepspeed",
        "amp.enabled: true with {method}",
        "Apex scales the loss on its own",
        "use fp16 or bf16",
    ),
    Refusal(
        "deepspeed autocast",
        "deepspeed",
        "torch_autocast.dtype: float16 with {method}",
        "each rank's scaler would decide alone",
        "use bfloat16, or fp16",
    ),
    Refusal(
        "deepspeed outer method in half precision",
        "deepspeed",
        "{detail}.enabled: true with {method}",
        "it averages parameters, of which DeepSpeed then has two copies",
        "train in fp32, or with torch_autocast in bfloat16",
        kinds=("outer",),
    ),
    Refusal(
        "deepspeed Lamb in half precision",
        "deepspeed",
        "optimizer.type: 'Lamb' under {detail} with {method}",
        "DeepSpeed's wrapper hands Lamb its gradients past the optimizer's step",
        "use onebit_lamb, or another optimizer",
        kinds=("gradient",),
    ),
    Refusal(
        "deepspeed legacy fusion",
        "deepspeed",
        "optimizer.legacy_fusion: true with {method}",
        "gradients then bypass the optimizer's step",
        "leave it out",
    ),
    Refusal(
        "deepspeed deepcompile",
        "deepspeed",
        "compile.deepcompile: true with {method}",
        "it reduces gradients in its compiled graph",
        "leave it out",
    ),
    Refusal(
        "deepspeed sparse gradients",
        "deepspeed",
        "sparse_gradients: true with {method}",
        "sparse gradients are not supported",
        "leave it out",
    ),
    Refusal(
        "deepspeed hybrid engine",
        "deepspeed",
        "hybrid_engine.enabled: true with {method}",
        "it has not been made to work with methods",
        "leave it out",
    ),
    Refusal(
        "deepspeed autotuning",
        "deepspeed",
        "autotuning.enabled: true with {method}",
        "it restarts the training with other settings",
        "leave it out",
    ),
    Refusal(
        "accelerate unprepared optimizer",
        "accelerate",
        "an AcceleratedOptimizer without its Accelerator",
        "no Accelerator of this process has prepared it",
        "pass what accelerator.prepare(optimizer) returned, and keep the accelerator",
    ),
    Refusal(
        "accelerate unprepared model",
        "accelerate",
        "a model that was not prepared",
        "the Accelerator of the optimizer does not know it",
        "write model, optimizer = accelerator.prepare(model, optimizer)",
    ),
    Refusal(
        "accelerate sharding",
        "accelerate",
        "{detail} under Accelerate",
        "it shards or averages by itself",
        "use DDP, FSDP2 (fsdp_version=2) or DeepSpeed",
    ),
    Refusal(
        "accelerate hook",
        "accelerate",
        "DistributedDataParallelKwargs(comm_hook={detail})",
        "it compresses already, and DDP takes one hook",
        "leave it out",
    ),
    Refusal(
        "accelerate sync_each_batch",
        "accelerate",
        "sync_each_batch",
        "it exchanges the same gradients several times before a step, and residuals with them",
        "leave it out",
    ),
    Refusal(
        "accelerate scaler",
        "accelerate",
        "grad_scaler under Accelerate",
        "the loss is scaled by accelerator.scaler, which is found",
        "leave grad_scaler out",
    ),
    Refusal(
        "accelerate ddp around an outer method",
        "accelerate",
        "{method} on a model that prepare() has wrapped in DDP",
        "DDP averages gradients in every step, and {method} is there to do without that",
        "write model = accelerator.prepare_model(model, evaluation_mode=True), and prepare the rest without it",
        kinds=("outer",),
    ),
    Refusal(
        "accelerate without ddp",
        "accelerate",
        "{method} on a {detail} without DDP",
        "gradients are exchanged in DDP's backward",
        "pass what accelerator.prepare(model) returns, without evaluation_mode",
        kinds=_EVERY_STEP,
    ),
    Refusal(
        "trainer callbacks",
        "transformers",
        "a second method for a Trainer",
        "this one has a CommoptCallback already",
        "leave one out",
    ),
    Refusal(
        "trainer without callback",
        "transformers",
        "a CommoptCallback that its Trainer does not know",
        "it hears nothing of the training",
        "write trainer.add_callback(callback)",
    ),
    Refusal(
        "trainer optimizer",
        "transformers",
        "an optimizer ({detail}) beside a Trainer",
        "the Trainer steps its own",
        "give it to the Trainer: optimizers=(optimizer, None)",
    ),
    Refusal(
        "trainer deepspeed",
        "transformers",
        "deepspeed= of the TrainingArguments",
        "DeepSpeed exchanges gradients itself",
        'leave attach out, and write the method into its JSON, {{"commopt": {{"method": "dgc"}}}}, with '
        "`import commopt.frameworks.deepspeed` in the script",
    ),
    Refusal(
        "trainer fsdp",
        "transformers",
        "fsdp= of the TrainingArguments",
        "a Trainer's sharded model is not supported",
        "use fully_shard in a loop of your own, or DDP",
    ),
    Refusal(
        "trainer devices",
        "transformers",
        "a Trainer with several GPUs in one process",
        "it averages inside itself",
        "start one process per GPU, by torchrun",
    ),
    Refusal(
        "trainer batch size",
        "transformers",
        "auto_find_batch_size",
        "it starts training anew on one rank alone",
        "set per_device_train_batch_size",
    ),
    Refusal(
        "trainer trial",
        "transformers",
        "hyperparameter_search",
        "a method belongs to one training",
        "make a Trainer for each trial",
    ),
    Refusal(
        "trainer has trained",
        "transformers",
        "a Trainer that has trained already",
        "its model is wrapped, and its optimizer has made steps",
        "attach before the first train()",
    ),
    Refusal(
        "trainer left",
        "transformers",
        "a second train() after close, which outer methods do themselves at the end",
        "{method} has left this Trainer's job",
        "make another Trainer to train again",
    ),
    Refusal(
        "trainer without ddp",
        "transformers",
        "evaluate() or predict() before train() on several ranks",
        "the Trainer (transformers 5.23) then leaves DDP out, and would train each rank alone",
        "make another Trainer for train(), or set eval_on_start=True",
        kinds=_EVERY_STEP,
    ),
    Refusal(
        "fsdp update method",
        "fsdp",
        "{method} with FSDP2",
        "it keeps an optimizer's state for whole parameters, and each rank has only a shard of them",
        "use a gradient method, such as two_way or powersgd, or DistributedDataParallel",
        kinds=("update",),
    ),
    Refusal(
        "fsdp outer method",
        "fsdp",
        "{method} with FSDP2",
        "it averages whole parameters every few steps, and each rank has only a shard of them",
        "use a gradient method, or a model that is not sharded",
        kinds=("outer",),
    ),
    Refusal(
        "fsdp max_norm",
        "fsdp",
        "max_norm with FSDP2",
        "no rank has the gradients of all shards",
        "leave it out, and call torch.nn.utils.clip_grad_norm_(model.parameters(), ...) after backward, when they are averaged",
        kinds=_EVERY_STEP,
    ),
    Refusal(
        "fsdp grad_scaler",
        "fsdp",
        "grad_scaler with FSDP2",
        "each shard would decide alone whether to skip a step",
        "leave it out, and train in bfloat16",
        kinds=_EVERY_STEP,
    ),
    Refusal(
        "fsdp overlap",
        "fsdp",
        "overlap={detail} with FSDP2",
        "FSDP decides when each unit is exchanged",
        "leave overlap out",
    ),
    Refusal(
        "fsdp joint decision",
        "fsdp",
        "{method} in this form with FSDP2",
        "it needs one norm or scale for the whole model, and no rank has more than a shard",
        "use a scale per block, or another method",
        kinds=_EVERY_STEP,
    ),
    Refusal(
        "fsdp 1",
        "fsdp",
        "FullyShardedDataParallel, the first FSDP",
        "it has no place for a method",
        "use torch.distributed.fsdp.fully_shard instead",
    ),
    Refusal(
        "fsdp of another torch",
        "fsdp",
        "FSDP2 of torch {detail}",
        "the exchange is built on that name, and was tested with torch 2.13",
        "use torch 2.13, or DistributedDataParallel",
    ),
    Refusal(
        "compiled fsdp",
        "fsdp",
        "torch.compile around a sharded model",
        "the hooks belong to the sharded model inside",
        "attach to the sharded model first, then compile it",
    ),
    Refusal(
        "fsdp with tensor parallelism",
        "fsdp",
        "{detail}: tensor parallelism with FSDP2",
        "its parameters are split twice, and only FSDP's shards are known here",
        "leave tensor parallelism out",
    ),
    Refusal(
        "fsdp in float16",
        "fsdp",
        "{detail}: float16 gradients with FSDP2",
        "FSDP divides them in two parts, before and after the exchange",
        "set MixedPrecisionPolicy(reduce_dtype=torch.bfloat16) or float32, and let the method compress",
    ),
    Refusal(
        "fsdp sum",
        "fsdp",
        "{detail}: set_force_sum_reduction_for_comms",
        "FSDP then divides after the exchange",
        "leave it out",
    ),
    Refusal(
        "fsdp hook",
        "fsdp",
        "{detail}: an all-reduce hook of your own",
        "FSDP takes only one",
        "leave it out",
    ),
    Refusal(
        "fsdp offload",
        "fsdp",
        "{detail}: CPUOffloadPolicy with GPUs",
        "it keeps shards off the device they are exchanged on",
        "leave it out",
    ),
    Refusal(
        "fsdp without shards",
        "fsdp",
        "{detail}: a mesh without a shard dimension",
        "the model is replicated, and not sharded",
        "use DistributedDataParallel",
    ),
    Refusal(
        "fsdp on several meshes",
        "fsdp",
        "several meshes in {detail}",
        "one group of ranks averages all shards",
        "call fully_shard with the same mesh everywhere",
    ),
    Refusal(
        "fsdp ignored_params",
        "fsdp",
        "{detail} among ignored_params",
        "FSDP does not average it",
        "shard it, or freeze it",
    ),
    Refusal(
        "fsdp with an empty shard",
        "fsdp",
        "{detail} without an element of the model",
        "that rank would have nothing to exchange",
        "shard the model over fewer ranks",
    ),
    Refusal(
        "fsdp group",
        "fsdp",
        "group: {detail}",
        "its ranks are not those that hold this shard in other replicas",
        "leave it out, or pass TorchGroup(mesh.get_group(...)) of the dimension that replicates",
    ),
    Refusal(
        "fsdp one replica",
        "fsdp",
        "a mesh with one replica",
        "there is nothing to average",
        "leave commopt out",
    ),
    Refusal(
        "scatter exact",
        "fsdp",
        "{method} on a mesh of one dimension",
        "FSDP's own reduce-scatter is exact",
        "leave commopt out, or give FSDP a mesh with a replicate dimension",
    ),
    Refusal(
        "scatter of another method",
        "fsdp",
        "{method} on a mesh of one dimension",
        "it cannot compress a reduce-scatter",
        "use {detail}, or give FSDP a mesh with a replicate dimension, between whose replicas any gradient method works",
    ),
    Refusal(
        "scatter server",
        "fsdp",
        "server= of {method} on a mesh of one dimension",
        "a reduce-scatter has no answers to compress",
        "leave it out",
    ),
    Refusal(
        "scatter dense_1d",
        "fsdp",
        "dense_1d of {method} on a mesh of one dimension",
        "a unit's gradient is exchanged in one form",
        "leave it out",
    ),
    Refusal(
        "scatter codec",
        "fsdp",
        "{detail} on a mesh of one dimension",
        "it has one scale for a whole parameter, or messages of no fixed length",
        "use int8, 4bit, fp8, sign, natural or qsgd",
    ),
    Refusal(
        "scatter divide factor",
        "fsdp",
        "{detail}: set_gradient_divide_factor on a mesh of one dimension",
        "a compressed reduce-scatter takes the mean",
        "leave it out",
    ),
    Refusal(
        "scatter custom",
        "fsdp",
        "{detail}: a custom reduce-scatter of your own",
        "FSDP takes only one",
        "leave it out",
    ),
)

_BY_FACT = {one.fact: one for one in REFUSALS}


def refuse(facts: Mapping[str, object], method: str, kind: Kind) -> None:
    """Raise AttachError for the first fact that holds and concerns a method of this kind.

    facts: by the table's names; the value is falsy, or the detail that the error shows.
    """
    for fact, detail in facts.items():
        refusal = _BY_FACT[fact]
        if detail and kind in refusal.kinds:
            raise AttachError(refusal.text(method, detail))
