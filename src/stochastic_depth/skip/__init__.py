"""How branches are dropped while the model runs: what is decided, and what becomes of calls and sums."""
