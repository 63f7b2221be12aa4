"""Inside a machine: its ranks share out a bucket, so that each exchanges a part with the other machines, and put it together again."""

from __future__ import annotations

import torch

from commopt.groups.base import Group, summed
from commopt.wire.bucket import Bucket, Share
from commopt.wire.payload import Payload


def machine_mean(bucket: Bucket, share: Share | None, inside: Group | None, dtype: torch.dtype | None = None) -> Bucket:
    """This rank's share of the mean over its machine's ranks, in the bucket's dtype; the bucket itself if it is alone there.

    dtype: in which the ranks' gradients travel; if None, as they are, and the mean is exact.
    """
    if share is None or inside is None:
        return bucket
    sent = [Payload.of(share.take(bucket, rank).to(dtype or bucket.flat.dtype)) for rank in range(inside.size)]
    parts = [payload.tensors[0].to(bucket.flat.dtype) for payload in inside.all_to_all(sent)]
    return share.bucket(bucket, summed(parts) / inside.size)


def own_share(bucket: Bucket, share: Share | None) -> Bucket:
    """This rank's share of a bucket that all of its machine's ranks have."""
    return bucket if share is None else share.bucket(bucket, share.take(bucket, share.rank))


def put_together(own: Bucket, bucket: Bucket, share: Share | None, inside: Group | None) -> Bucket:
    """A bucket like `bucket`, made of the shares of the machine's ranks; the share itself if this rank is alone there."""
    if share is None or inside is None:
        return own
    whole = bucket.with_flat(bucket.flat.new_empty(len(bucket.flat), dtype=own.flat.dtype))
    whole.void = own.void
    if own.void is None:
        places = share.places(bucket)
        lengths = [[place.stop - place.start for place in one] for one in places]
        layouts = [((own.flat.dtype, sum(one)),) for one in lengths]
        for k, payload in enumerate(inside.all_gather(Payload.of(own.flat), layouts)):
            for place, part in zip(places[k], torch.split(payload.tensors[0], lengths[k]), strict=True):
                whole.flat[place] = part
    return whole
