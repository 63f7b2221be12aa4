"""The mean of compressed buckets that every rank sends to every other."""

from __future__ import annotations

from commopt.exchange.compressed import Compressed
from commopt.groups.base import Group
from commopt.wire.bucket import Blocks, Bucket


class GatherMean(Compressed):
    """The mean of every rank's compressed bucket, by all-gather: (N-1) payloads, for codecs that cannot be summed on the way."""

    def exchange_blocks(self, bucket: Bucket, blocks: Blocks, group: Group) -> None:
        blocks = self.keyed(blocks, self.compressor)
        own, gathered, bad = self.gathered(bucket.flat, blocks, group)
        if self.is_void(bucket, bad, group):
            return self.worker.undo(bucket.flat, [own], [blocks])
        self.compressor.add_up_(gathered, blocks, bucket.flat, alpha=1 / group.size)
        return self.forget(self.worker, [blocks])

    def bytes_per_parameter(self, ranks: int) -> float:
        return (ranks - 1) * self.compressor.bytes_per_element(ranks)
