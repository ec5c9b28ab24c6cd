"""Which labels are clean, from a mixture of two normal distributions of the losses. arXiv 1904.11238, 2002.07394

Losses are scaled to [0, 1]; the component with the smaller mean is taken to be that of the clean labels. The mixture is
scikit-learn's, with DivideMix's settings: 100 steps at most, tolerance 0.01, 0.0005 added to the variances.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

STEPS, TOLERANCE, ADDED_VARIANCE = 100, 1e-2, 5e-4


def clean_posteriors(losses: Tensor, real: Tensor) -> Tensor:
    """Of each sample the probability that it belongs to the component of small losses, one mixture for each row.

    losses  [N, n]
    real    [N, n] bool      samples that count; the others get 0
    returns [N, n] float32   1 in a row whose losses are all equal, or not numbers: nothing tells them apart
    raises  ImportError that names the extra where scikit-learn is missing
    """
    try:
        from sklearn.mixture import GaussianMixture
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ImportError("mixtures are scikit-learn's: pip install 'anabranch[federated]'") from error
    mixture = GaussianMixture(2, max_iter=STEPS, tol=TOLERANCE, reg_covar=ADDED_VARIANCE, random_state=0)
    posteriors = torch.zeros(losses.shape)
    with threadpool_limits(1, user_api="openmp"):  # several threads would add in an order of their own
        for row, values, mine in zip(posteriors, losses, real, strict=True):
            row[mine] = _of_one(mixture, values[mine].double().numpy())
    return posteriors


def _of_one(mixture: Any, values: np.ndarray) -> Tensor:
    lowest, highest = values.min(initial=np.inf), values.max(initial=-np.inf)
    if not lowest < highest or not np.isfinite(highest - lowest):
        return torch.ones(len(values))
    scaled = ((values - lowest) / (highest - lowest))[:, None]
    mixture.fit(scaled)
    return torch.from_numpy(mixture.predict_proba(scaled)[:, mixture.means_[:, 0].argmin()]).float()
