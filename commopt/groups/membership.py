"""The members of a job, as its launcher lists them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace

from commopt.errors import ConfigError
from commopt.secret import given_secret


@dataclass(frozen=True)
class Membership:
    """The members of a job as the launcher lists them: (address, port) of every rank, and a word that only its members know."""

    rank: int
    addresses: tuple[tuple[str, int], ...]
    job: str
    returns: bool = False
    secret: bytes | None = field(default=None, repr=False)  # what proves that a message is a member's

    @classmethod
    def from_environment(cls) -> Membership | None:
        """Read COMMOPT_PEERS, and this rank's place from COMMOPT_NODE_RANK, LOCAL_WORLD_SIZE and LOCAL_RANK; None without COMMOPT_PEERS.

        COMMOPT_RETURNS=1 says that this rank was restarted in a running job; the secret is `given_secret`. Raises ConfigError for a
        value that is not the launcher's.
        """
        text = os.environ.get("COMMOPT_PEERS")
        if not text:
            return None
        try:
            given = json.loads(text)
            addresses = tuple((str(host).strip("[]"), int(port)) for host, port in given["members"])
            place = [int(os.environ.get(key, "0")) for key in ("COMMOPT_NODE_RANK", "LOCAL_RANK")]
            rank = place[0] * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + place[1]
            if not 0 <= rank < len(addresses):
                raise ValueError(f"no rank {rank} among {len(addresses)} members")
            job = str(given["job"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"environment: COMMOPT_PEERS={text:.80}: {error}") from None
        return cls(rank, addresses, job, os.environ.get("COMMOPT_RETURNS") == "1", given_secret())

    def of_number(self, number: int, ranks: int) -> Membership:
        """The members that have this number on their machines, which have `ranks` each."""
        if len(self.addresses) % ranks or self.rank % ranks != number:
            raise ConfigError(f"environment: {len(self.addresses)} members do not make machines of {ranks} ranks")
        addresses, job = self.addresses[number::ranks], f"{self.job} {number}" if ranks > 1 else self.job
        return replace(self, rank=self.rank // ranks, addresses=addresses, job=job)
