"""How branches are dropped while the model runs: decisions, and what becomes of calls and sums."""
