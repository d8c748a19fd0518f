"""Clusters on the plane: densities, scores and means are what sums and derivatives say they are."""

import pytest
import torch

from sdlearn.explore.clusters import Clusters

WORLD = Clusters(torch.tensor([[-1.0, 0.5], [1.0, 0.0], [0.2, -0.8]], dtype=torch.float64),
                 torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 0.2)
ONLY = torch.tensor([True, False, True])
ALPHA, SIGMA = 0.8, 0.6


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("only", [None, ONLY])
def test_points_lie_around_their_own_clusters_as_often_as_these_weigh(only):
    x, k = WORLD.draw(20000, seeded(), only)
    weights = WORLD.weights if only is None else WORLD.weights * only
    assert torch.allclose(k.bincount(minlength=3) / len(k), (weights / weights.sum()).float(), atol=0.02)
    assert torch.allclose((x - WORLD.centres[k]).std(dim=0), torch.tensor(0.2, dtype=x.dtype), atol=0.01)


def test_what_is_left_of_the_density_is_that_of_the_clusters_left():
    x, _ = WORLD.draw(50, seeded())
    share = (WORLD.log_p(x, ALPHA, SIGMA, ONLY) - WORLD.log_p(x, ALPHA, SIGMA)).exp()
    rest = (WORLD.log_p(x, ALPHA, SIGMA, ~ONLY) - WORLD.log_p(x, ALPHA, SIGMA)).exp()
    assert torch.allclose(share + rest, torch.ones_like(share))


@pytest.mark.parametrize("only", [None, ONLY])
def test_the_mean_is_what_the_score_says(only):
    """Tweedie: x0 = (x + sigma^2 score) / alpha."""
    x = WORLD.draw(50, seeded())[0].requires_grad_()
    [score] = torch.autograd.grad(WORLD.log_p(x, ALPHA, SIGMA, only).sum(), x)
    assert torch.allclose(WORLD.x0(x, ALPHA, SIGMA, only), (x + SIGMA**2 * score) / ALPHA)


def test_without_noise_a_point_is_its_own_mean():
    x, _ = WORLD.draw(50, seeded())
    assert torch.allclose(WORLD.x0(x, 1.0, 0.0), x)
