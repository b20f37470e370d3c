"""``python -m stochastic_depth``: the `stochastic-depth` command."""

import sys

from stochastic_depth_command import main

if __name__ == "__main__":
    sys.exit(main())
