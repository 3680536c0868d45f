import jax
import jax.numpy as jnp
import optax
from optax import contrib

from opus_jax.config import ModelConfig
from opus_jax.models import presets, transformer
from opus_jax.optim.labels import decay_mask, group_labels


def test_only_stacked_block_kernels_go_to_muon(params):
    assert group_labels(params) == {
        "blocks": {"mlp": {"kernel": "muon", "bias": "adam"}, "norm": {"gain": "adam"}},
        "embedding": {"embedding": "adam"},
        "head": {"kernel": "adam"},
        "final_norm": {"gain": "adam"},
    }


def test_optax_default_rule_is_the_wrong_way_round(params):
    state = contrib.muon(1e-3).init(params)
    momentum = state.inner_states["muon"].inner_state[0].mu
    assert isinstance(momentum["blocks"]["mlp"]["kernel"], optax.MaskedNode)
    assert isinstance(momentum["embedding"]["embedding"], jax.Array)


def test_matrices_and_embeddings_decay_and_vectors_do_not(params):
    assert decay_mask(params) == {
        "blocks": {"mlp": {"kernel": True, "bias": False}, "norm": {"gain": False}},
        "embedding": {"embedding": True},
        "head": {"kernel": True},
        "final_norm": {"gain": False},
    }


def test_stacked_per_head_gains_are_not_matrices():
    assert decay_mask({"blocks": {"query": {"gain": jnp.zeros((2, 4, 8))}}}) == {"blocks": {"query": {"gain": False}}}


def test_names_are_those_of_our_transformer():
    spec = presets.resolve(ModelConfig(preset="gpt2-small"), 64, 16)
    shapes = jax.eval_shape(lambda: transformer.init(spec, jax.random.key(0)))
    for path, label in jax.tree_util.tree_leaves_with_path(group_labels(shapes)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert (label == "muon") == (name.startswith("blocks/") and name.endswith("/kernel")), name
    for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(shapes)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert decays == name.endswith(("kernel", "embedding")), name
