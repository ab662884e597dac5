"""Texts that say nearly the same, by the sequences of words that they share."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

_COMPARE_ALL = 200
"""Up to so many texts, each is compared with each."""

_HASHES = 128
_PRIME = np.uint64((1 << 31) - 1)

Shingles = NDArray[np.uint64]
"""Hashes of a text's sequences of words, sorted, each once."""


def near_duplicates(texts: Sequence[str], *, similarity: float, words: int) -> set[int]:
    """The places of texts that repeat an earlier one which is kept.

    Equal but for white space; or, with `similarity` below 1, with at least that Jaccard index of their sets of so many
    `words` in a row (a shorter text is one sequence). Of more than 200 texts only those are compared that MinHash
    (Broder 1997) finds: 128 hashes in bands, so many that a pair at the limit is found with a probability of at least
    0.99. What is found is always compared exactly, so nothing is taken for a repetition that is none.
    """
    repeated: set[int] = set()
    first: dict[str, int] = {}
    for place, text in enumerate(texts):
        if first.setdefault(" ".join(text.split()), place) != place:
            repeated.add(place)
    if similarity >= 1:
        return repeated
    places = [place for place in range(len(texts)) if place not in repeated]
    shingles = {place: _shingles(texts[place], words) for place in places}
    found = _candidates(places, shingles, similarity) if len(places) > _COMPARE_ALL else _earlier(places)
    for place, others in found:
        if any(other not in repeated and _jaccard(shingles[place], shingles[other]) >= similarity for other in others):
            repeated.add(place)
    return repeated


def _earlier(places: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
    for number, place in enumerate(places):
        yield place, places[:number]


def _shingles(text: str, words: int) -> Shingles:
    parts = text.split()
    count = max(1, len(parts) - words + 1)
    rows = {" ".join(parts[first : first + words]) for first in range(count)}
    digests = b"".join(hashlib.blake2b(row.encode(), digest_size=8).digest() for row in rows)
    return np.unique(np.frombuffer(digests, np.uint64))


def _jaccard(one: Shingles, other: Shingles) -> float:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def _candidates(
    places: Sequence[int], shingles: dict[int, Shingles], similarity: float
) -> Iterator[tuple[int, Sequence[int]]]:
    """For each text the earlier ones that have all hashes of some band in common with it."""
    rows = _rows_of_a_band(similarity)
    random = np.random.default_rng(0)
    factors = random.integers(1, int(_PRIME), _HASHES, dtype=np.uint64)
    offsets = random.integers(0, int(_PRIME), _HASHES, dtype=np.uint64)
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for place in places:
        # Below 2^31, so that the products fit into 64 bits.
        hashes = shingles[place] % _PRIME
        least = np.full(_HASHES, _PRIME, np.uint64)
        for part in np.array_split(hashes, len(hashes) // 4096 + 1):
            least = np.minimum(least, ((factors[:, None] * part + offsets[:, None]) % _PRIME).min(axis=1))
        others: set[int] = set()
        for band in range(_HASHES // rows):
            bucket = buckets[band, least[band * rows : (band + 1) * rows].tobytes()]
            others.update(bucket)
            bucket.append(place)
        yield place, sorted(others)


def _rows_of_a_band(similarity: float) -> int:
    """The most hashes in one band with which a pair at the limit is still found with a probability of 0.99."""
    fitting = [r for r in range(1, 33) if 1 - (1 - similarity**r) ** (_HASHES // r) >= 0.99]
    return max(fitting, default=1)
