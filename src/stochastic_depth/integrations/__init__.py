"""Stochastic depth in training engines; each module needs its engine, and none is imported here."""
