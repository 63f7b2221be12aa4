"""What launch/torchrun.sh tells torchrun, and what it refuses before anything is started."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from networks import needs_ipv6
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import config_from_args, get_args_parser

SCRIPT = Path(__file__).parents[2] / "launch" / "torchrun.sh"
GOOD = {"HEAD": "127.0.0.1", "NODES": "2", "NODE": "1", "PRINT": "1"}


def run(changed: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": os.environ["PATH"], **GOOD, **changed}
    return subprocess.run([SCRIPT, *words], env=variables, capture_output=True, text=True, check=False)


def understood(**changed: str) -> tuple[list[str], Any]:
    """The variables before the command, and torchrun's own reading of it."""
    done = run(changed, "train.py", "--options", '{"freeze_step": 2}')
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    place = words.index("python")
    variables, words = words[:place], words[place:]
    assert words[:3] == ["python", "-m", "torch.distributed.run"]
    args = get_args_parser().parse_args(words[3:])
    assert [args.training_script, *args.training_script_args] == ["train.py", "--options", '{"freeze_step": 2}']
    return variables, config_from_args(args)[0]


def test_c10d_names_the_store_the_host_and_this_machines_address() -> None:
    for node in "01":
        variables, config = understood(NODE=node, JOB="night", PORT="29600", SLOTS="3", RESTARTS="4", WAIT_S="50")
        assert variables == ["GLOO_SOCKET_IFNAME=lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]
        assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.max_restarts) == (2, 2, 3, 4)
        assert (config.rdzv_backend, config.rdzv_endpoint, config.run_id) == ("c10d", "127.0.0.1:29600", "night")
        conf = config.rdzv_configs
        assert (conf["is_host"], conf["read_timeout"]) == (str(node == "0").lower(), "50")
        assert config.local_addr == "127.0.0.1"


def test_static_names_the_rank_of_the_node() -> None:
    variables, config = understood(RENDEZVOUS="static")
    assert variables == ["GLOO_SOCKET_IFNAME=lo"]
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("static", "127.0.0.1:29500")
    assert config.rdzv_configs["rank"] == 1
    assert config.rdzv_configs["timeout"] == "600"


def test_it_says_where_it_meets_the_others() -> None:
    done = run({"PRINT": "", "PYTHON": "true"}, "train.py")
    assert (done.returncode, done.stderr) == (0, "torchrun.sh: node 1 of 2, to meet the others at 127.0.0.1:29500\n")


@needs_ipv6
@pytest.mark.parametrize("head", ["::1", "[::1]"])
def test_head_may_be_an_ipv6_address(head: str) -> None:
    for rendezvous in ("c10d", "static"):
        variables, config = understood(HEAD=head, NODE="0", RENDEZVOUS=rendezvous)
        assert variables[0] == "GLOO_SOCKET_IFNAME=lo"
        assert parse_rendezvous_endpoint(config.rdzv_endpoint, -1) == ("::1", 29500)
        assert config.local_addr == ("::1" if rendezvous == "c10d" else None)


def test_what_was_set_by_hand_stays() -> None:
    variables, config = understood(INTERFACE="ib0", ADDRESS="10.9.0.7")
    assert (variables[0], config.local_addr) == ("GLOO_SOCKET_IFNAME=ib0", "10.9.0.7")
    assert understood(GLOO_SOCKET_IFNAME="eth7")[0][0] == "GLOO_SOCKET_IFNAME=eth7"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"HEAD": ""}, "HEAD is not set"),
        ({"HEAD": "no-such-host.invalid"}, "HEAD=no-such-host.invalid: no address is known"),
        ({"HEAD": "192.0.2.1", "NODE": "0"}, "192.0.2.1 is not an address of this one"),
        ({"NODES": "two"}, "NODES=two is no number of machines"),
        ({"NODES": "0"}, "NODES=0 is no number of machines"),
        ({"NODE": ""}, "NODE= is none of 2 machines"),
        ({"NODE": "2"}, "NODE=2 is none of 2 machines"),
        ({"SLOTS": "auto"}, "SLOTS=auto is no number of processes"),
        ({"PORT": "70000"}, "PORT=70000 is no port"),
        ({"RESTARTS": "-1"}, "RESTARTS=-1 is no number"),
        ({"WAIT_S": "1m"}, "WAIT_S=1m is no number of seconds"),
        ({"RENDEZVOUS": "etcd"}, "RENDEZVOUS=etcd is unknown; write c10d or static"),
        ({"RENDEZVOUS": "static", "RESTARTS": "1"}, "RESTARTS=1 needs RENDEZVOUS=c10d"),
    ],
)
def test_a_mistake_is_named_before_anything_starts(changed: dict[str, str], message: str) -> None:
    done = run({**changed, "PRINT": "", "PYTHON": "/bin/false"}, "train.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("torchrun.sh: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_program_is_named() -> None:
    done = run({})
    assert (done.returncode, done.stderr.startswith("torchrun.sh: no program; ")) == (2, True)
