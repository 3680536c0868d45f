import jax
import jax.numpy as jnp
import numpy as np
from reference_model import SPECS, perturbed_parameters, quick_jit, reference_logits

from opus_jax.models.loss import batch_loss, cross_entropy, row_losses, token_losses

SPEC = SPECS["simplenorm"]
TOKENS = np.random.default_rng(3).integers(0, 32, (3, 10)).astype(np.int32)
SEGMENTS = np.array([[1] * 10, [1] * 4 + [2] * 6, [0] * 10], np.int32)
MASK = np.array([[0] + [1] * 9, [0, 1, 1, 1, 0, 1, 1, 1, 1, 0], [0] * 10], np.float32)
BATCH = {"tokens": jnp.asarray(TOKENS), "segment_ids": jnp.asarray(SEGMENTS), "loss_mask": jnp.asarray(MASK)}


@quick_jit
def all_losses(params, batch):
    return token_losses(SPEC, params, batch), row_losses(SPEC, params, batch), batch_loss(SPEC, params, batch)


def losses(batch):
    return all_losses(perturbed_parameters(SPEC), batch)


def nats(document):
    """Of each token after the first, by the reference."""
    logits = reference_logits(SPEC, perturbed_parameters(SPEC), document)[:-1]
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(document) - 1), document[1:]]


def test_index_i_holds_the_loss_of_predicting_token_i_from_those_before():
    tokens, rows, (total, count) = losses(BATCH)
    np.testing.assert_allclose(tokens[0, 1:], nats(TOKENS[0]), rtol=1e-4)
    np.testing.assert_allclose(tokens[1, 1:4], nats(TOKENS[1, :4]), rtol=1e-4)
    np.testing.assert_allclose(tokens[1, 5:9], nats(TOKENS[1, 4:])[:-1], rtol=1e-4)
    np.testing.assert_array_equal(np.asarray(tokens)[MASK == 0], 0)
    np.testing.assert_allclose(rows[1], tokens[1].sum() / 7, rtol=1e-6)
    np.testing.assert_allclose(total, tokens.sum(), rtol=1e-6)
    assert count == MASK.sum()


def test_a_row_without_targets_has_loss_zero():
    assert losses(BATCH)[1][2] == 0


def test_the_first_token_is_never_a_target_even_if_the_mask_says_so():
    tokens, _, (_, count) = losses(BATCH | {"loss_mask": jnp.ones((3, 10))})
    np.testing.assert_array_equal(tokens[:, 0], 0)
    assert count == 27


def test_a_token_changes_its_own_loss_and_later_ones_only():
    changed = TOKENS.copy()
    changed[0, 4] = (changed[0, 4] + 1) % 32
    before, after = losses(BATCH)[0], losses(BATCH | {"tokens": jnp.asarray(changed)})[0]
    np.testing.assert_array_equal(before[0, :4], after[0, :4])
    assert (np.abs(before[0, 4:] - after[0, 4:]) > 1e-6).all()


def test_cross_entropy_survives_huge_logits():
    logits = jnp.asarray([[[1e4, 0.0, -1e4]]])
    np.testing.assert_allclose(cross_entropy(logits, jnp.asarray([[1]])), 1e4)
    gradient = jax.grad(lambda x: cross_entropy(x, jnp.asarray([[1]])).sum())(logits)
    np.testing.assert_allclose(gradient[0, 0], [1, -1, 0], atol=1e-6)
