from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opus_jax.errors import UserError
from opus_jax.selection.opus import select
from opus_jax.selection.redundancy import select_in_rounds
from tests.selection.oracle import sequential

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
UTILITIES = jnp.asarray(RANDOM.normal(size=16), jnp.float32)
FEATURES = RANDOM.normal(size=(16, 6))
GRAM = jnp.asarray(0.1 * FEATURES @ FEATURES.T, jnp.float32)


def by_gram(gram):
    return lambda chosen: gram[:, chosen].sum(axis=1)


def nothing(chosen):
    return jnp.zeros(16)


@partial(jax.jit, static_argnames=("k", "rounds", "temperature"))
def choose(utilities, gram, key, *, k=6, rounds=3, temperature=0.0):
    return select_in_rounds(utilities, k, rounds=rounds, temperature=temperature, key=key, penalty=by_gram(gram))


def in_rounds_by_hand(utilities, gram, k, rounds, temperature, key):
    u, gram = np.asarray(utilities, np.float64), np.asarray(gram, np.float64)
    order, taken = [], np.zeros(len(u))
    for number in range(rounds):
        noise = np.asarray(jax.random.gumbel(jax.random.fold_in(key, number), (len(u),)), np.float64)
        ranked = (u - taken) / u.std() + temperature * noise
        ranked[order] = -np.inf
        picks = np.argsort(-ranked)[: k // rounds].tolist()
        order += picks
        taken += gram[:, picks].sum(1)
    return sorted(order)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("rounds", [2, 3])
def test_is_the_choice_in_rounds_worked_out_by_hand(temperature, rounds):
    for seed in range(8):
        indices, _ = choose(UTILITIES, GRAM, jax.random.key(seed), rounds=rounds, temperature=temperature)
        by_hand = in_rounds_by_hand(UTILITIES, GRAM, 6, rounds, temperature, jax.random.key(seed))
        np.testing.assert_array_equal(indices, by_hand)


def test_as_many_rounds_as_picks_is_the_exact_sequence_without_the_self_term():
    indices, found = choose(UTILITIES, GRAM, KEY, rounds=6, temperature=0.5)
    order = sequential(UTILITIES, GRAM, 6, 0.5, KEY, self_term=False)
    np.testing.assert_array_equal(indices, sorted(order))
    for place, i in enumerate(order):
        assert float(found["redundancy"][i]) == pytest.approx(sum(float(GRAM[i, j]) for j in order[:place]), abs=1e-5)


@pytest.mark.parametrize("law", [{"temperature": 0.5}, {"temperature": 0.0}, {"temperature": 0.5, "entropy": 0.6}])
def test_one_round_is_the_plain_choice(law):
    plain = select(UTILITIES, 6, key=KEY, **law)
    one = select_in_rounds(UTILITIES, 6, rounds=1, key=KEY, penalty=by_gram(GRAM), **law)
    jax.tree.map(np.testing.assert_array_equal, plain, one)


def test_no_penalty_at_temperature_zero_is_top_k():
    indices, found = select_in_rounds(UTILITIES, 6, rounds=3, temperature=0.0, key=KEY, penalty=nothing)
    np.testing.assert_array_equal(indices, select(UTILITIES, 6, temperature=0.0, key=KEY)[0])
    np.testing.assert_allclose(found["probability"][indices], np.full(6, 1 / 6), rtol=1e-6)


def test_the_penalty_is_called_once_less_than_there_are_rounds_with_the_rounds_picks():
    seen = []
    select_in_rounds(
        UTILITIES,
        6,
        rounds=3,
        temperature=0.0,
        key=KEY,
        penalty=lambda chosen: (seen.append(chosen), jnp.zeros(16))[1],
    )
    assert [(x.shape, x.dtype) for x in seen] == [((2,), jnp.int32)] * 2
    best = np.argsort(-np.asarray(UTILITIES))
    assert [set(x.tolist()) for x in seen] == [set(best[:2].tolist()), set(best[2:4].tolist())]


@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_a_duplicate_of_an_earlier_round_is_penalised(strength):
    features = np.eye(8)
    features[1] = features[0]
    gram = jnp.asarray(strength * features @ features.T, jnp.float32)
    utilities = jnp.array([3.1, 3.0, 2.5, 2.4, 2.3, 0.0, 0.0, 0.0])
    indices, _ = choose(utilities, gram, KEY, k=3)
    assert indices.tolist() == ([0, 2, 3] if strength else [0, 1, 2])


@pytest.mark.parametrize("temperature", [0.0, 1e-30, np.inf])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_broken_penalties_and_utilities_never_choose_a_row_twice(temperature, value):
    utilities = UTILITIES.at[3].set(jnp.nan)
    for gram in (jnp.full((16, 16), value), jnp.zeros((16, 16)).at[5].set(value)):
        indices, found = choose(utilities, gram, KEY, k=8, rounds=4, temperature=temperature)
        assert len(set(indices.tolist())) == 8
        assert np.isfinite(found["redundancy"]).all()
        assert float(found["probability"].sum()) == pytest.approx(1)


@pytest.mark.parametrize("temperature", [0.0, np.inf])
def test_broken_utilities_come_last(temperature):
    utilities = UTILITIES.at[3].set(jnp.nan)
    indices, found = choose(utilities, GRAM, KEY, k=15, rounds=5, temperature=temperature)
    np.testing.assert_array_equal(indices, [i for i in range(16) if i != 3])
    assert int(found["nonfinite"]) == 1


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_equal_utilities_are_chosen_at_random_and_said_so(temperature):
    def pick(seed):
        return choose(jnp.ones(16), GRAM, jax.random.key(seed), k=4, rounds=2, temperature=temperature)

    assert len({tuple(pick(seed)[0].tolist()) for seed in range(8)}) > 1
    _, found = pick(0)
    assert bool(found["degenerate"])
    np.testing.assert_allclose(found["probability"], np.full(16, 1 / 16))


@pytest.mark.parametrize("rounds", [0, 4, 7])
def test_rounds_that_do_not_divide_are_named(rounds):
    with pytest.raises(UserError, match=f"redundancy_rounds = {rounds} does not divide the 6 rows"):
        select_in_rounds(UTILITIES, 6, rounds=rounds, temperature=0.5, key=KEY, penalty=nothing)
