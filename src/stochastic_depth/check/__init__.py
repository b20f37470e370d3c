"""What stochastic depth does to a model: a summary of it, and a proof that it does no more."""
