"""Seeds and content keys: hashes of everything they depend on."""

from __future__ import annotations

import hashlib
import json

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_json(value: object) -> str:
    """`value` as JSON text that is equal for equal values."""
    return _CANONICAL.encode(value)


def content_key(*parts: object) -> str:
    """The first 16 hexadecimal digits of the sha256 of `parts`."""
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:16]


def derive_seed(*parts: object) -> int:
    """A seed in 0..2**63-1 that depends on `parts` alone.

    Equal cells therefore draw equal numbers on any machine.
    """
    return int.from_bytes(hashlib.sha256(canonical_json(parts).encode()).digest()[:8]) >> 1
