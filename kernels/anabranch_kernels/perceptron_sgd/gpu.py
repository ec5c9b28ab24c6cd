"""SGD of perceptrons on the GPU: torch's batched products, which are the reference's, in float32.

Layout   rows as they are; a step is two products for each layer, and one more below the first.
Bound    memory for small ones: rows and velocities are read and written in every step.
Numerics float32; the order of sums is torch's.
Not here a kernel that keeps a row on its multiprocessor, as the CPU keeps it in a cache. Nobody trains federations on
         a GPU with this package yet.
"""

from .reference import train as perceptron_sgd

__all__ = ["perceptron_sgd"]
