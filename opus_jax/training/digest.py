"""Running hashes of what a run did, so that two runs can be compared bit for bit by one short string.

digest_t = sha256(digest_{t-1} + content_t), from `EMPTY`. The state is the hexadecimal string itself: it fits into
a checkpoint, and a resumed run continues it.
"""

import hashlib

EMPTY = "0" * 64


def extend(digest: str, content: bytes) -> str:
    """The digest after one more step.

    Args:
      digest: 64 hexadecimal digits: `EMPTY` or an earlier result.
      content: the step's bytes, of fixed width and little-endian: a float32 loss, or int64 example ids in batch
        order. Which steps share a call matters; give one at a time.

    Raises:
      ValueError: `digest` is not 64 hexadecimal digits.
    """
    before = bytes.fromhex(digest)
    if len(before) != 32:
        raise ValueError(f"a digest has 64 hexadecimal digits, not {digest!r}")
    return hashlib.sha256(before + content).hexdigest()
