"""SGD of perceptrons on a GPU beside the reference."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from anabranch_kernels.perceptron_sgd import reference
from anabranch_kernels.perceptron_sgd.op import perceptron_sgd

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("widths", [(5, 3), (33, 16, 17), (64, 64, 10)])
def test_it_trains_as_the_reference(widths):
    generator, counts = torch.Generator().manual_seed(0), torch.tensor([19, 0, 7])
    D = sum((a + 1) * b for a, b in pairwise(widths))
    rows = torch.randn(3, D, generator=generator) / max(widths) ** 0.5
    x = torch.randn(40, widths[0], generator=generator)
    index, y = torch.randint(40, (3, 19), generator=generator), torch.randint(widths[-1], (3, 19), generator=generator)
    expected, moving = rows.double(), torch.zeros_like(rows, dtype=torch.float64)
    reference.perceptron_sgd(expected, moving, x, index, y, counts, widths, 4, 0.02, 0.9, 1e-2)
    there = [tensor.cuda() for tensor in (rows, torch.zeros_like(rows), x, index, y, counts)]
    perceptron_sgd(*there, widths=widths, batch=4, lr=0.02, momentum=0.9, weight_decay=1e-2)
    assert_close(there[0].cpu().double(), expected, rtol=1e-4, atol=1e-5)  # float32, some steps of sums of 64
