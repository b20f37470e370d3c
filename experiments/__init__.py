"""What stochastic depth is good for, measured: each module is a command that writes its section of
docs/evidence.md. They can be interrupted: what was run is kept, and is not run again.
"""
