"""Mixtures of losses beside scikit-learn's, beside Bayes' rule for known normal distributions, and their edges."""

import math

import pytest
import torch

from anabranch.labels.mixtures import ADDED_VARIANCE, STEPS, TOLERANCE, clean_posteriors

GENERATOR = torch.Generator().manual_seed(0)
CLEAN, NOISY = torch.randn(400, generator=GENERATOR) * 0.1 + 1, torch.randn(600, generator=GENERATOR) * 0.3 + 2


def test_posteriors_are_bayes_rule_for_the_distributions_drawn_from():
    losses = torch.cat([CLEAN, NOISY])
    density = lambda mean, std: torch.distributions.Normal(mean, std).log_prob(losses).exp()
    clean, noisy = 0.4 * density(1.0, 0.1), 0.6 * density(2.0, 0.3)
    found = clean_posteriors(losses[None], torch.ones(1, 1000, dtype=torch.bool))[0]
    exact = clean / (clean + noisy)
    # 1000 draws estimate means and spreads to some percent, which moves the posteriors of the few between the two
    assert float((found - exact).abs().mean()) < 0.01
    assert float(((found > 0.5) == (exact > 0.5)).float().mean()) > 0.99


def scikit_learns(losses, real):
    """The same, row by row, by scikit-learn with DivideMix's settings."""
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(2, max_iter=STEPS, tol=TOLERANCE, reg_covar=ADDED_VARIANCE, random_state=0)
    found = torch.zeros(losses.shape)
    for row, mine, values in zip(found, real, losses.double(), strict=True):
        chosen = values[mine].numpy()[:, None]
        scaled = (chosen - chosen.min()) / (chosen.max() - chosen.min())
        mixture.fit(scaled)
        row[mine] = torch.from_numpy(mixture.predict_proba(scaled)[:, mixture.means_[:, 0].argmin()]).float()
    return found


@pytest.mark.parametrize("n", [20, 67, 300])
def test_mixtures_are_scikit_learn_s_where_two_kinds_of_losses_are_apart(n):
    """Where they are not, its k-means may begin elsewhere, and both stop before the end."""
    generator = torch.Generator().manual_seed(n)
    clean = torch.rand(20, n, generator=generator) < torch.linspace(0.2, 0.8, 20)[:, None]
    small, large = torch.randn(20, n, generator=generator).abs() / 2, 6 + torch.randn(20, n, generator=generator) / 2
    clean[:, 0], clean[:, 1] = True, False
    losses = torch.where(clean, small, large)
    real = torch.arange(n) < torch.randint(n // 2, n + 1, (20, 1), generator=generator)
    found = clean_posteriors(losses, real)
    torch.testing.assert_close(found, scikit_learns(losses, real), atol=1e-3, rtol=0)
    assert torch.equal(found > 0.5, clean & real)


def test_a_row_does_not_depend_on_its_company_nor_on_what_is_not_real():
    losses = torch.stack([CLEAN[:50], NOISY[:50], torch.cat([CLEAN[:20], NOISY[:30]])])
    real = torch.arange(50) < torch.tensor([[50], [17], [35]])
    together = clean_posteriors(losses, real)
    losses[1, 17:] = math.nan  # nobody looks at these
    for row, mine, values in zip(together, real, losses, strict=True):
        assert torch.equal(clean_posteriors(values[mine][None], torch.ones(1, int(mine.sum())) > 0)[0], row[mine])
        assert not row[~mine].any()


@pytest.mark.parametrize("values", [[2.0], [3.0, 3.0, 3.0], [1.0, math.nan], [1.0, math.inf]])
def test_where_nothing_tells_labels_apart_all_are_clean(values):
    losses = torch.tensor([values])
    assert clean_posteriors(losses, torch.ones_like(losses) > 0).tolist() == [[1.0] * len(values)]


def test_two_losses_are_two_components():
    assert clean_posteriors(torch.tensor([[4.0, 1.0]]), torch.tensor([[True, True]]))[0].round().tolist() == [0, 1]


def test_scale_and_offset_do_not_matter():
    losses = torch.cat([CLEAN[:40], NOISY[:60]]).double()[None]
    real = torch.ones(1, 100, dtype=torch.bool)
    # scaled losses differ in their last bits, so do the fits
    torch.testing.assert_close(clean_posteriors(losses * 7 + 3, real), clean_posteriors(losses, real))
