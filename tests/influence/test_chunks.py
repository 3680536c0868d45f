import jax
import jax.numpy as jnp
import numpy as np

from opus_jax.influence.chunks import map_chunks


def test_rows_come_back_in_order_and_chunks_are_interleaved():
    rows = {"x": jnp.arange(8), "y": jnp.arange(16).reshape(8, 2)}
    seen = map_chunks(lambda part: (part["x"], part["y"], jnp.broadcast_to(part["x"].min(), (4,))), rows, 4)
    np.testing.assert_array_equal(seen[0], rows["x"])
    np.testing.assert_array_equal(seen[1], rows["y"])
    # Chunk 0 holds rows 0, 2, 4, 6: one from each quarter of the batch.
    np.testing.assert_array_equal(seen[2], [0, 1] * 4)


def test_only_one_chunk_is_in_memory():
    sizes = []

    def record(part):
        sizes.append(part.shape[0])
        return part

    jax.eval_shape(lambda x: map_chunks(record, x, 2), jnp.zeros((6, 3)))
    assert set(sizes) == {2}
