"""What a teacher teaches, against PyTorch in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import TERNARY, drawn, tiny

from spectra_jax.model.parameters import apply, graphdef_of, init_parameters
from spectra_jax.train.distillation import Teacher, distillation_loss, divergence, feature_distance
from spectra_jax.train.objective import batch_loss

B, T, D, V, L = 3, 8, 6, 17, 2


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_its_gradients(temperature):
    h, head, other, other_head = normal(0, B, T, D), normal(1, D, V), normal(2, B, T, D + 2), normal(3, D + 2, V)
    loss, grads = jax.value_and_grad(
        lambda h, head: divergence((h, head), (jnp.asarray(other), jnp.asarray(other_head)), 4, temperature), (0, 1)
    )(jnp.asarray(h), jnp.asarray(head))
    x, w = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (h, head))
    y, z = (torch.tensor(a, dtype=torch.float64) for a in (other, other_head))
    expected = torch.nn.functional.kl_div(
        torch.log_softmax(x @ w / temperature, -1).reshape(-1, V),
        torch.softmax(y @ z / temperature, -1).reshape(-1, V), reduction="batchmean",
    ) * temperature**2
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(grads, (x.grad, w.grad)):
        np.testing.assert_allclose(a, b.numpy(), atol=2e-7)


def test_feature_distance_and_its_gradient():
    ours, theirs = normal(4, L, B, T, D), normal(5, L, B, T, D)
    total, grad = jax.value_and_grad(lambda a: jnp.sum(feature_distance(a, jnp.asarray(theirs))))(jnp.asarray(ours))
    a, b = torch.tensor(ours, dtype=torch.float64, requires_grad=True), torch.tensor(theirs, dtype=torch.float64)
    expected = (1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)).mean(dim=(1, 2)).sum()
    expected.backward()
    assert float(total) == pytest.approx(expected.item(), rel=1e-6)
    np.testing.assert_allclose(grad, a.grad.numpy(), atol=1e-7)


def test_feature_distance_knows_no_lengths():
    ours, theirs = normal(6, L, B, T, D), normal(7, L, B, T, D)
    longer = jnp.asarray(ours * np.exp(3 * normal(8, L, B, T, 1)))
    ours, theirs = jnp.asarray(ours), jnp.asarray(theirs)
    np.testing.assert_allclose(feature_distance(longer, theirs), feature_distance(ours, theirs), rtol=1e-5)
    np.testing.assert_allclose(feature_distance(longer, ours), 0, atol=1e-6)


@pytest.mark.parametrize("scale", [None, 64.0])
def test_the_whole_loss(scale):
    """The sum of its terms; nothing is left to learn from oneself; a loss scale multiplies gradients alone."""
    config = tiny(*TERNARY, "distill.teacher=x", "distill.next_token=0.5", "distill.features=2.0")
    m, key = config.model, jax.random.key(0)
    teacher_model = tiny().model
    parameters, theirs = (drawn(jax.eval_shape(lambda: init_parameters(m, key)), seed) for seed in (0, 1))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, (4, config.data.T + 1)), jnp.int32)
    graph, teacher_graph = graphdef_of(m), graphdef_of(teacher_model)

    def loss(parameters, config, graphdef, teacher, scale=None):
        return distillation_loss(config, graphdef, parameters, tokens, teacher, scale)

    teacher = Teacher(teacher_graph, theirs)
    scaled = None if scale is None else jnp.asarray(scale)
    total, gradient = jax.value_and_grad(loss)(parameters, config, graph, teacher, scaled)
    model, master = apply(graph, parameters), apply(teacher_graph, theirs)
    (h, f), (other_h, other_f) = model.features(tokens[:, :-1]), master.features(tokens[:, :-1])
    assert f.shape == (m.L, 4, config.data.T, m.D)
    np.testing.assert_array_equal(h, model.hidden(tokens[:, :-1]))
    np.testing.assert_allclose(model.norm(f[-1]), h, atol=1e-6)
    terms = (
        0.5 * batch_loss(graph, parameters, tokens, 2),
        divergence((h, model.head_matrix()), (other_h, theirs["head"]), 2),
        2.0 * jnp.sum(feature_distance(f, other_f)),
    )
    assert float(total) == pytest.approx(float(sum(terms)), rel=1e-6) and all(term > 0.01 for term in terms)
    plain = jax.grad(loss)(parameters, config, graph, teacher)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(plain)):
        np.testing.assert_allclose(a, b * (scale or 1), rtol=1e-4, atol=1e-5)
    own = tiny("distill.teacher=x")
    assert float(loss(theirs, own, teacher_graph, teacher)) == pytest.approx(0, abs=1e-6)
