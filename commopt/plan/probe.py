"""What `commopt probe` has measured on a cluster: the file that `commopt advise` reads."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from commopt.errors import ConfigError
from commopt.reading import SpecModel, validated

Positive = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Costs = list[tuple[Count, Seconds]]  # elements, seconds
Calls = list[tuple[Count, Positive, Annotated[float, Field(ge=0, le=1)]]]  # bytes, seconds, share of the processor
SCHEMA = 1


class Part(SpecModel):
    """A part of the file: frozen, without unknown keys, and with finite numbers only."""

    model_config = ConfigDict(allow_inf_nan=False, populate_by_name=True)


class Pair(Part):
    """One direction between two nodes, while nobody else sends."""

    source: str = Field(alias="from")
    to: str
    latency_s: Seconds
    bytes_per_s: Positive


class CodecCosts(Part):
    """What a method computes in one step on one rank, without a network, while all ranks compute.

    exchange: encoding and decoding. step: the optimizer's step, by the method itself or by AdamW if the method leaves it to the user's.
    If ranks share cores, both are processor seconds divided by the cores of a rank, which other programs disturb less.
    """

    exchange: Costs
    step: Costs


class Script(Part):
    """A training script's own times.

    compute_s: the median of a step without communication, on the slowest rank; of all ranks if they share cores. spread: standard
    deviation of these times over steps and ranks, as a share of their mean. step_s: of a step under `dense`, if known. buckets:
    elements, in the order of their exchange. overlap: they are exchanged during backward.
    """

    program: str
    parameters: Count
    compute_s: Positive
    spread: Seconds
    step_s: Positive | None = None
    buckets: list[Count]
    overlap: bool


class Probe(Part):
    """What was measured, in bytes and seconds, by node, operation and method.

    device: "cpu", or a GPU's name. cores_per_rank: of a machine. rates: what the cluster's file says of each node's link; None if
    unlimited. together: what each node sends while all send, around a ring. exchanges: among machines, all slots at once; bytes are what
    one rank contributes. inside: machine mean and putting together of a float32 tensor among the slots of a machine. copy_bytes_per_s:
    of a float32 copy, all ranks at once. profiles: of the methods with the script's own parameters; see `commopt.plan.profile`.
    """

    version: Literal[1] = Field(1, alias="schema")
    created: str
    commopt: str
    torch: str
    cluster: str
    nodes: list[str] = Field(min_length=2)
    slots: Count
    backend: Literal["gloo", "nccl"]
    device: str
    cores_per_rank: Positive
    emulated: bool
    rates: dict[str, Positive | None]
    pairs: list[Pair] = Field(min_length=1)
    together: dict[str, Positive]
    exchanges: dict[Literal["all_reduce", "all_gather", "all_to_all"], Calls]
    inside: Calls
    copy_bytes_per_s: Positive
    codecs: dict[str, CodecCosts]
    profiles: dict[str, dict[str, Any]] = Field({})
    script: Script | None = None

    def mistakes(self) -> Iterator[tuple[str, str]]:
        known = set(self.nodes)
        named = {f"pairs.{k}": {pair.source, pair.to} for k, pair in enumerate(self.pairs)}
        named |= {"rates": set(self.rates), "together": set(self.together)}
        for key, names in named.items():
            if strange := sorted(names - known):
                yield key, f"no node {strange[0]!r}; known: {', '.join(self.nodes)}"
        for name in ("all_reduce", "all_gather", "all_to_all"):
            if not self.exchanges.get(name):
                yield f"exchanges.{name}", "is missing; write it"

    def write(self, path: Path) -> None:
        """Write the file, one key on a line. Raises ConfigError if that is impossible."""
        lines = [f'"{key}": {json.dumps(value)}' for key, value in self.model_dump(by_alias=True).items()]
        try:
            path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--out {path}: cannot be written: {(error.strerror or str(error)).lower()}") from None


def read_probe(path: str | Path) -> Probe:
    """Read a file that `commopt probe` has written. Raises ConfigError, one line per mistake: `FILE: key: what is wrong`."""
    again = "measure again: commopt probe CLUSTER.yaml"
    try:
        data: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; make it: commopt probe CLUSTER.yaml --out {path}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: is not JSON, or cut off; {again}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    if not isinstance(data, dict) or not {"schema", "pairs"} <= set(data):
        raise ConfigError(f"{path}: was not written by commopt probe; {again}")
    if data["schema"] != SCHEMA:
        other = f"schema {data['schema']!r:.20} is of another version of commopt, and this one reads {SCHEMA}"
        raise ConfigError(f"{path}: {other}; {again}")
    return validated(Probe, data, str(path))
