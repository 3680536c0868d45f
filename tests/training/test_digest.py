import hashlib

import numpy as np
import pytest

from opus_jax.training import digest

LOSSES = np.array([3.5, 2.25, np.nan], np.float32)


def chain(losses, start=digest.EMPTY):
    for loss in losses:
        start = digest.extend(start, loss.tobytes())
    return start


def test_is_the_chain_of_sha256():
    once = hashlib.sha256(bytes(32) + LOSSES[0].tobytes()).digest()
    assert chain(LOSSES[:2]) == hashlib.sha256(once + LOSSES[1].tobytes()).hexdigest()


def test_resumes_from_its_hexadecimal_state():
    assert chain(LOSSES[1:], start=chain(LOSSES[:1])) == chain(LOSSES)


def test_one_bit_and_the_order_matter():
    nearly = LOSSES.copy()
    nearly[0] = np.nextafter(nearly[0], np.float32(4))
    assert len({chain(LOSSES), chain(nearly), chain(LOSSES[::-1]), digest.EMPTY}) == 4


@pytest.mark.parametrize("bad", ["", "abcd", "zz" * 32])
def test_refuses_what_is_no_digest(bad):
    with pytest.raises(ValueError, match="hexadecimal"):
        digest.extend(bad, b"x")
