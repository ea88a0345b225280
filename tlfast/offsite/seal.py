"""How an owner knows its own bundle again, without a word in it that tells anyone else which model it came from.

A plain hash of the full model would let everybody who guesses the model confirm the guess, and would tell two bundles
of one model as such. A seal is HMAC-SHA256 of the manifest (a random nonce in it) under a key that is made of every
weight of the model without head and pooler: only who holds all of them, those of the middle too, can make or check one.
So can whoever was sent a bundle with the whole middle (keep:all). An owner whose model others may hold, such as a
public one, adds a secret.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

from ..backbone import fingerprint
from .architecture import base_of


def seal_key(model: Any, secret: bytes = b"") -> bytes:
    """The key of a model's seals, from all its weights but head and pooler. secret: of the owner, empty for none."""
    return hmac.digest(fingerprint(base_of(model), "offsite").encode(), secret, "sha256")


def seal(manifest: Mapping[str, Any], key: bytes) -> str:
    """HMAC-SHA256, in hexadecimal, of all of a manifest but its seal."""
    unsealed = {name: value for name, value in manifest.items() if name != "seal"}
    text = json.dumps(unsealed, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def is_sealed(manifest: Mapping[str, Any], key: bytes) -> bool:
    """Whether a manifest has the seal of this key."""
    return hmac.compare_digest(seal(manifest, key), manifest["seal"])
