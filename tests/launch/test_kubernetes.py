"""launch/kubernetes.yaml is a PyTorchJob that the training operator accepts, and torchrun understands what it makes of it.

The fields and types are those of kubeflow.org/v1 in the Kubeflow training operator 1.9 (pkg/apis/kubeflow.org/v1), and of the
Kubernetes pod template as far as the manifest uses it.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import config_from_args, get_args_parser

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "launch" / "kubernetes.yaml"


class Each(dict[str, Any]):
    """A mapping with any keys, whose values are all of the kind under ''."""


QUANTITY = re.compile(r"\d+(\.\d+)?(m|[KMGTPE]i?)?")
CONTAINER = {
    "name!": str,
    "image!": str,
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
    "workingDir": str,
    "command": [str],
    "args": [str],
    "env": [{"name!": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath!": str}}}],
    "ports": [{"name": str, "containerPort!": int, "protocol": {"TCP", "UDP"}}],
    "resources": {"requests": Each({"": QUANTITY}), "limits": Each({"": QUANTITY})},
    "volumeMounts": [{"name!": str, "mountPath!": str}],
    "securityContext": {
        "allowPrivilegeEscalation": bool,
        "readOnlyRootFilesystem": bool,
        "capabilities": {"add": [str], "drop": [str]},
    },
}
POD = {
    "containers!": [CONTAINER],
    "volumes": [{"name!": str, "persistentVolumeClaim": {"claimName!": str}, "emptyDir": Each({"": str})}],
    "nodeSelector": Each({"": str}),
    "securityContext": {
        "runAsNonRoot": bool,
        "runAsUser": int,
        "fsGroup": int,
        "seccompProfile": {"type!": {"RuntimeDefault", "Unconfined", "Localhost"}},
    },
}
REPLICAS = {
    "replicas": int,
    "restartPolicy": {"Always", "OnFailure", "Never", "ExitCode"},
    "template": {"metadata": {"labels": Each({"": str}), "annotations": Each({"": str})}, "spec": POD},
}
JOB = {
    "apiVersion!": {"kubeflow.org/v1"},
    "kind!": {"PyTorchJob"},
    "metadata!": {"name!": str, "namespace": str, "labels": Each({"": str})},
    "spec!": {
        "nprocPerNode": str,
        "runPolicy": {
            "cleanPodPolicy": {"All", "Running", "None"},
            "ttlSecondsAfterFinished": int,
            "activeDeadlineSeconds": int,
            "backoffLimit": int,
        },
        "elasticPolicy": {
            "minReplicas": int,
            "maxReplicas": int,
            "maxRestarts": int,
            "rdzvBackend": {"c10d", "etcd", "etcd-v2"},
            "rdzvPort": int,
            "rdzvHost": str,
            "rdzvId": str,
            "rdzvConf": [{"key": str, "value": str}],
        },
        "pytorchReplicaSpecs!": {"Master": REPLICAS, "Worker": REPLICAS},
    },
}


def mistakes(value: Any, kind: Any, place: str = "") -> Iterator[str]:
    """What of a manifest is not of this kind: a type, a set of words, a pattern, [items] or {key: kind}, where key! must be there."""
    if isinstance(kind, type):
        if type(value) is not kind:
            yield f"{place}: {value!r} is no {kind.__name__}"
    elif isinstance(kind, set):
        if value not in kind:
            yield f"{place}: {value!r} is none of {sorted(kind)}"
    elif isinstance(kind, re.Pattern):
        if not isinstance(value, str | int) or not kind.fullmatch(str(value)):
            yield f"{place}: {value!r} is no quantity"
    elif isinstance(kind, list):
        if not isinstance(value, list):
            yield f"{place}: {value!r} is no list"
            return
        for index, item in enumerate(value):
            yield from mistakes(item, kind[0], f"{place}[{index}]")
    elif not isinstance(value, dict):
        yield f"{place}: {value!r} is no mapping"
    else:
        known = {key.rstrip("!"): inner for key, inner in kind.items()}
        for key, inner in value.items():
            if isinstance(kind, Each):
                yield from mistakes(inner, kind[""], f"{place}.{key}")
            elif key in known:
                yield from mistakes(inner, known[key], f"{place}.{key}")
            else:
                yield f"{place}.{key}: unknown field"
        yield from (f"{place}.{key[:-1]}: is missing" for key in kind if key.endswith("!") and key[:-1] not in value)


@pytest.fixture
def job() -> Any:
    return yaml.safe_load(MANIFEST.read_text())


def test_the_manifest_has_the_operators_fields_and_types(job: Any) -> None:
    assert list(mistakes(job, JOB)) == []


def test_a_wrong_manifest_is_found_out(job: Any) -> None:
    worker = ("spec", "pytorchReplicaSpecs", "Worker")
    for path, value, expected in [
        (("spec", "elasticPolicy", "rdzvBackend"), "mpi", "rdzvBackend: 'mpi' is none of"),
        (("spec", "nprocPerNode"), 1, "nprocPerNode: 1 is no str"),
        ((*worker, "replica"), 4, "Worker.replica: unknown field"),
        ((*worker, "template", "spec", "containers", 0, "resources", "limits", "memory"), "4 GB", "is no quantity"),
        ((*worker, "template", "spec", "containers", 0, "env", 1, "value"), 2, "env[1].value: 2 is no str"),
        ((*worker, "template", "spec", "containers"), None, "containers: None is no list"),
    ]:
        wrong = copy.deepcopy(job)
        inner = wrong
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        (found,) = mistakes(wrong, JOB)
        assert expected in found
    del job["metadata"]["name"]
    assert list(mistakes(job, JOB)) == [".metadata.name: is missing"]


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
    assert not [
        word for word in container["env"] if word["name"].startswith("PET_")
    ]  # they would win over the operator's


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
