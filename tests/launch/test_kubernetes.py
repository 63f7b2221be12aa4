"""launch/kubernetes.yaml is a PyTorchJob that the training operator accepts, and torchrun understands what it makes of it.

The fields and types are those of kubeflow.org/v1 in the Kubeflow training operator 1.9 (pkg/apis/kubeflow.org/v1), and of the
Kubernetes pod template, as far as the manifest uses them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import ConfigDict, Field, ValidationError, create_model
from torch.distributed.run import config_from_args, get_args_parser

ROOT = Path(__file__).parents[2]
QUANTITIES = dict[str, Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|[KMGTPE]i?)?$")] | int]
CONTAINER = {
    "name!": str,
    "image!": str,
    "workingDir": str,
    "command": [str],
    "args": [str],
    "env": [{"name!": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath!": str}}}],
    "ports": [{"name": str, "containerPort!": int, "protocol": Literal["TCP", "UDP"]}],
    "resources": {"requests": QUANTITIES, "limits": QUANTITIES},
    "securityContext": {"allowPrivilegeEscalation": bool, "capabilities": {"drop": [str]}},
}
POD = {
    "containers!": [CONTAINER],
    "securityContext": {
        "runAsNonRoot": bool,
        "runAsUser": int,
        "seccompProfile": {"type!": Literal["RuntimeDefault", "Unconfined", "Localhost"]},
    },
}
REPLICAS = {
    "replicas": int,
    "restartPolicy": Literal["Always", "OnFailure", "Never", "ExitCode"],
    "template": {"spec": POD},
}
JOB = {
    "apiVersion!": Literal["kubeflow.org/v1"],
    "kind!": Literal["PyTorchJob"],
    "metadata!": {"name!": str},
    "spec!": {
        "nprocPerNode": str,
        "runPolicy": {"cleanPodPolicy": Literal["All", "Running", "None"], "backoffLimit": int},
        "elasticPolicy": {
            "minReplicas": int,
            "maxReplicas": int,
            "maxRestarts": int,
            "rdzvBackend": Literal["c10d", "etcd", "etcd-v2"],
            "rdzvPort": int,
            "rdzvId": str,
            "rdzvConf": [{"key": str, "value": str}],
        },
        "pytorchReplicaSpecs!": {"Worker": REPLICAS},
    },
}


def model_of(kind: Any) -> Any:
    """What pydantic understands of {key: kind}, where key! must be there, and of [kind]."""
    if isinstance(kind, list):
        return list[model_of(kind[0])]  # type: ignore[misc]
    if not isinstance(kind, dict):
        return kind
    fields: dict[str, Any] = {
        key.rstrip("!"): (model_of(inner), ... if key.endswith("!") else None) for key, inner in kind.items()
    }
    return create_model("Part", __config__=ConfigDict(extra="forbid", strict=True), **fields)


@pytest.fixture
def job() -> Any:
    return yaml.safe_load((ROOT / "launch" / "kubernetes.yaml").read_text())


def test_the_manifest_has_the_operators_fields_and_types_and_no_others(job: Any) -> None:
    known = model_of(JOB)
    known.model_validate(job)
    del job["metadata"]["name"]
    job["spec"]["pytorchReplicaSpecs"]["Worker"] |= {"replica": 4, "restartPolicy": "Sometimes"}
    with pytest.raises(ValidationError, match="3 validation errors"):
        known.model_validate(job)


def operators_environment(job: Any) -> dict[str, str]:
    """What the operator sets in each pod of an elastic job (1.9, pkg/controller.v1/pytorch: envvar.go, elastic.go)."""
    policy, spec = job["spec"]["elasticPolicy"], job["spec"]
    return {
        "PYTHONUNBUFFERED": "1",
        "PET_NPROC_PER_NODE": spec["nprocPerNode"],
        "PET_RDZV_ENDPOINT": f"{job['metadata']['name']}-worker-0:{policy['rdzvPort']}",
        "PET_RDZV_BACKEND": policy["rdzvBackend"],
        "PET_NNODES": f"{policy['minReplicas']}:{policy['maxReplicas']}",
        "PET_MAX_RESTARTS": str(policy["maxRestarts"]),
        "PET_RDZV_ID": policy["rdzvId"],
        "PET_RDZV_CONF": ",".join(f"{one['key']}={one['value']}" for one in policy["rdzvConf"]),
    }


def test_torchrun_understands_what_the_operator_tells_it(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    for key, value in operators_environment(job).items():
        monkeypatch.setenv(key, value)
    program, *words = [word.replace("$(POD_IP)", "10.0.0.7") for word in [*container["command"], *container["args"]]]
    assert program == "torchrun"
    args = get_args_parser().parse_args(words)
    config = config_from_args(args)[0]
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (4, worker["replicas"], 1)
    assert (config.rdzv_backend, config.rdzv_endpoint, config.run_id) == ("c10d", "commopt-worker-0:23456", "commopt")
    assert (config.max_restarts, config.local_addr) == (3, "10.0.0.7")
    assert config.rdzv_configs["read_timeout"] == "600"
    assert (ROOT / args.training_script).is_file()
    # which would override the operator's
    assert not [word for word in container["env"] if word["name"].startswith("PET_")]


def test_the_pods_are_what_the_image_allows(job: Any) -> None:
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert container["name"] == "pytorch"  # the operator's own name for the container that trains
    assert f"USER {pod['securityContext']['runAsUser']}:" in dockerfile
    assert f"WORKDIR {container['workingDir']}\n" in dockerfile
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["pytorchjob-port"] == job["spec"]["elasticPolicy"]["rdzvPort"]
    assert os.path.basename(container["args"][0]) in os.listdir(ROOT / "launch")
