"""What the results document says of outer rounds, of faults, and of ranks that come and go.

Times `at_s` are seconds since the first rank's start, by the clocks of the ranks' machines.
"""

from __future__ import annotations

from pydantic import Field

from commopt.report.document_part import DocumentPart


class RankRounds(DocumentPart):
    """One rank's outer rounds."""

    rank: int = Field(description="the rank")
    rounds: int = Field(description="outer rounds that it made")
    missed: int = Field(description="those in which a scheduled peer's message did not come in time")
    missed_at_s: list[float] = Field([], description="when those ended, in seconds since the first rank's start")
    alone: int = Field(0, description="rounds in which it averaged with nobody, missed or sitting out")
    blocked_s: float = Field(description="seconds that training stood still for a round, mean over its rounds")
    blocked_share: float | None = Field(description="share of its steps' seconds that they stood still for rounds")
    exchange_s: float = Field(description="seconds from a round's start to its last message, mean over its rounds")
    bytes_per_step: float | None = Field(description="bytes that it sent in rounds, over its optimizer steps")


class Spread(DocumentPart):
    """How far apart the replicas were in one round."""

    step: int = Field(description="optimizer steps done when the round ended, of the rank that was farthest")
    at_s: float | None = Field(description="seconds since the first rank's start; null where the ranks do not say")
    spread: float = Field(
        description="consensus distance, the root mean square over replicas of ||x_i - mean|| / ||mean||, as the ranks "
        "estimated it last: the root mean square of their estimates"
    )


class Rounds(DocumentPart):
    """The outer rounds of a run, over all ranks."""

    rounds: int = Field(description="outer rounds of the rank that made most")
    missed: int = Field(description="rounds in which a scheduled peer's message did not come in time, over all ranks")
    blocked_s: float = Field(description="seconds that training stood still for a round, mean over rounds and ranks")
    blocked_worst_s: float = Field(description="the same of the rank with the largest mean")
    blocked_share: float | None = Field(
        description="share of the steps' seconds that they stood still for rounds, over steps and ranks"
    )
    exchange_s: float = Field(
        description="seconds from a round's start to its last message, mean over rounds and ranks"
    )
    bytes_per_step: float | None = Field(
        description="bytes that a rank sent in rounds, over its optimizer steps, rounds or not; mean over the ranks"
    )
    by_rank: list[RankRounds] = Field(description="the same for each rank")
    spread: list[Spread] = Field(
        [], description="the replicas' distance along the run; empty where no rank estimated it"
    )
    spread_end: float | None = Field(None, description="the last of these; null where there is none")


class RankValidation(DocumentPart):
    """The last validation of one rank, of its own replica."""

    rank: int = Field(description="the rank")
    after_steps: int = Field(description="steps of training before it")
    loss: float | None = Field(description="its loss; null where not finite")
    tokens: int = Field(description="tokens that it was measured on")


class EndedEarly(DocumentPart):
    """A rank that did not train to the end."""

    rank: int = Field(description="the rank")
    steps: int = Field(description="steps of training that were behind it; 0 where it wrote no record")


class ProgressPart(DocumentPart):
    """One start of one rank: from the first to the last step that it did without being started again."""

    at_s: list[float] = Field(description="when a step ended; of many steps some, with both ends of the longest pauses")
    steps: list[int] = Field(description="steps of training that were behind the rank then")


class Progress(DocumentPart):
    """When one rank had done how many steps."""

    rank: int = Field(description="the rank")
    node: str = Field(description="the name of its node")
    parts: list[ProgressPart] = Field(description="one for each time that it was started")
    ended: bool = Field(description="whether it trained to the end")


class MissedRounds(DocumentPart):
    """Rounds that a rank made without a scheduled peer."""

    rank: int = Field(description="the rank that waited in vain")
    rounds: int = Field(description="how many rounds")


class FaultCost(DocumentPart):
    """What the ranks went through from a fault's beginning to the next fault's, or to the end of training.

    The survivors are the ranks that were alive and, unless it is a cut, not on the fault's nodes.
    """

    longest_stop_s: float | None = Field(
        description="the survivors' longest time between the ends of two steps, as far as it lies in that window, "
        "without validations; null where there is no survivor with a step"
    )
    stopped_rank: int | None = Field(description="the rank with that stop")
    median_step_s: float | None = Field(description="that rank's median step, of the whole run, to compare it with")
    missed: list[MissedRounds] = Field(description="outer rounds that ranks missed in that window")
    back_after_s: float | None = Field(
        None,
        description="of a restart: seconds until the last of its ranks had ended a step again; null where one never did",
    )
    back_at_step: int | None = Field(None, description="of a restart: the number of that step, as recorded")


class Fault(DocumentPart):
    """A fault that the launcher injected."""

    kind: str = Field(description="kill, restart, cut, slow or hang")
    nodes: list[str] = Field(description="the nodes it was done to; of a cut, its two sides")
    ranks: list[int] = Field(description="the ranks of these nodes; none of a site")
    at_step: int = Field(
        description="the step that it was planned for: it came when the furthest rank had done so many"
    )
    at_s: float = Field(description="when it began, in seconds since the first rank's start")
    end_s: float | None = Field(None, description="when it was undone, by the same clock; null where it never was")
    for_s: float | None = Field(None, description="seconds that it was planned to last; null where to the end")
    factor: float | None = Field(None, description="of slow: the nodes got 1/factor of the processor's time")
    cost: FaultCost = Field(description="what it cost those who went on")
