"""How learner (rank 0) and engines meet, and how they find out whether weights can go through shared memory.

The learner offers a place in its memory; each engine tries to open it and says whether it could. Only where all could,
which is on one host, that is the way; else it is gloo. Who joins by `join_gloo_group` alone knows no other way.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from torch.distributed.distributed_c10d import ProcessGroupGloo

from rlsys.errors import WeightSyncError
from rlsys.shared_weights import SharedPlace, SharedReader
from rlsys.weights import OFFER_KEY, WeightGroup, answer_key, gloo_group, open_store, within

_SHARED = "shared"


def offer_weights(group: WeightGroup, place: SharedPlace | None, *, seconds: float) -> ProcessGroupGloo | None:
    """Meet the engines as the learner, with or without an offer; None means that all of them took it."""

    def meet() -> ProcessGroupGloo | None:
        store = open_store(group, rank=0, seconds=seconds)
        store.set(OFFER_KEY, json.dumps(place and asdict(place)))
        if place is not None:
            shared = all(store.get(answer_key(rank)) == b"yes" for rank in range(1, group.world_size))
            store.set(_SHARED, "yes" if shared else "no")
            for rank in range(1, group.world_size) if shared else ():
                store.get(_heard(rank))  # the store ends with this process's last reference to it
            if shared:
                return None
        return gloo_group(store, group, rank=0, seconds=seconds)

    return within(seconds, meet)


def accept_weights(
    group: WeightGroup, *, rank: int, seconds: float
) -> ProcessGroupGloo | tuple[SharedReader, SharedPlace]:
    """Meet the learner as an engine: the gloo group, or the shared memory and the place of the first weights in it."""

    def meet() -> ProcessGroupGloo | tuple[SharedReader, SharedPlace]:
        store = open_store(group, rank=rank, seconds=seconds)
        offer = json.loads(store.get(OFFER_KEY))
        if offer is not None:
            place = SharedPlace(**{**offer, "descriptors": tuple(offer["descriptors"])})
            try:
                reader = SharedReader(place)
            except WeightSyncError:
                reader = None
            store.set(answer_key(rank), "no" if reader is None else "yes")
            if store.get(_SHARED) == b"yes":
                store.set(_heard(rank), "yes")
                assert reader is not None
                return reader, place
        return gloo_group(store, group, rank=rank, seconds=seconds)

    return within(seconds, meet)


def _heard(rank: int) -> str:
    return f"heard/{rank}"
