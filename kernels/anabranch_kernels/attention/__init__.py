"""Dense, differentiable attention with unequal numbers of Q, K and V heads."""
