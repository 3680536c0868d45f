from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_model import SPECS, perturbed_parameters, reference_logits

from opus_jax.errors import UserError
from opus_jax.models.decoding import Sampling, generate, generate_tokens, keep_likely

SPEC = SPECS["simplenorm"]
PROMPT = [3, 14, 15]
continued = partial(generate, SPEC, perturbed_parameters(SPEC), PROMPT)


def test_greedy_text_takes_the_most_likely_token_of_the_reference():
    ids = list(PROMPT)
    for _ in range(6):
        ids.append(int(reference_logits(SPEC, perturbed_parameters(SPEC), np.array(ids))[-1].argmax()))
    assert continued(max_new_tokens=6, temperature=0.0) == ids[3:]
    assert continued(max_new_tokens=6, temperature=0.0, eos_id=ids[5]) == ids[3 : 3 + ids[3:].index(ids[5])]
    assert continued(max_new_tokens=0, temperature=0.0) == []


def test_equal_keys_give_equal_text():
    draw = partial(continued, max_new_tokens=12, temperature=1.5)
    assert draw(key=jax.random.key(1)) == draw(key=jax.random.key(1))
    assert draw(key=jax.random.key(1)) != draw(key=jax.random.key(2))


def test_top_k_of_one_is_greedy():
    greedy = continued(max_new_tokens=4, temperature=0.0)
    assert continued(max_new_tokens=4, temperature=5.0, top_k=1, key=jax.random.key(0)) == greedy


def test_kept_tokens_are_the_smallest_likely_set():
    logits = jnp.log(jnp.asarray([0.1, 0.4, 0.05, 0.3, 0.15]))

    def kept(top_k, top_p):
        return np.flatnonzero(np.isfinite(keep_likely(logits, top_k, top_p))).tolist()

    assert kept(None, None) == kept(9, 1.0) == [0, 1, 2, 3, 4]
    assert kept(2, None) == [1, 3]
    assert kept(None, 0.3) == [1]
    assert kept(None, 0.65) == kept(None, 0.69) == [1, 3]
    assert kept(None, 0.75) == [1, 3, 4]
    assert kept(2, 0.5) == [1]  # 0.4 of the 0.7 that top_k leaves


def test_drawn_frequencies_follow_the_temperature():
    logits = reference_logits(SPEC, perturbed_parameters(SPEC), np.array(PROMPT))[-1] / 2.0
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    drawn = [continued(max_new_tokens=1, temperature=2.0, key=jax.random.key(i))[0] for i in range(300)]
    counts = np.bincount(drawn, minlength=32)
    likely = expected > 0.02
    assert (np.abs(counts[likely] / 300 - expected[likely]) < 5 * np.sqrt(expected[likely] / 300)).all()


def test_rows_may_fill_the_position_table_but_not_pass_it():
    spec = SPECS["GPT-2"]
    fill = partial(generate, spec, perturbed_parameters(spec), [1] * 13, temperature=0.0)
    assert len(fill(max_new_tokens=3)) == 3
    with pytest.raises(UserError, match=r"17 together.*16 learned positions"):
        fill(max_new_tokens=4)


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {"temperature": 0.0}, "prompt is empty"),
        ([32], {"temperature": 0.0}, "vocabulary of 32"),
        ([1], {"temperature": 1.0}, "needs a key"),
        ([1], {"temperature": -1.0}, "temperature = -1.0"),
        ([1], {"temperature": 0.0, "top_k": 0}, "top_k = 0"),
        ([1], {"temperature": 0.0, "top_p": 0.0}, "top_p = 0.0"),
        ([1], {"temperature": 0.0, "max_new_tokens": -1}, "max_new_tokens = -1"),
    ],
)
def test_impossible_settings_are_named(prompt, settings, message):
    with pytest.raises(UserError, match=message):
        generate(SPEC, perturbed_parameters(SPEC), prompt, **({"max_new_tokens": 1} | settings))


def test_tokens_come_one_by_one():
    greedy = Sampling(temperature=0.0)
    stream = generate_tokens(SPEC, perturbed_parameters(SPEC), PROMPT, max_new_tokens=10**9, sampling=greedy)
    assert [next(stream) for _ in range(4)] == continued(max_new_tokens=4, temperature=0.0)


def test_text_goes_on_past_the_first_row():
    short, long = (continued(max_new_tokens=n, temperature=0.0) for n in (50, 70))
    assert long[:50] == short
    ids = np.array(PROMPT + long[:-1])
    assert long[-1] == reference_logits(SPEC, perturbed_parameters(SPEC), ids)[-1].argmax()
