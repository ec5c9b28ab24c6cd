"""Federated methods, one a module; each is FedAvg with some steps changed."""
