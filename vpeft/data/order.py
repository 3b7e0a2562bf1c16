"""The order in which TensorFlow Datasets stores a split, from its keys alone: the slices of VTAB-1k are ranks of it."""

import hashlib
from collections.abc import Iterable


def stored_order(salt: str, keys: Iterable[int | str]) -> list[int]:
    """Positions of keys, sorted by the MD5 of salt and key, as the 128-bit number that it is.

    Args:
        salt: the split's name, which stands before every key.
        keys: of the split's examples.
    """
    digests = [hashlib.md5(f"{salt}{key}".encode(), usedforsecurity=False).digest() for key in keys]
    return sorted(range(len(digests)), key=digests.__getitem__)
