"""Less depth after training: skip, rank, prune, and sample."""

from .importance import importance
from .prune import prune, shallow
from .record import Pruned, pruned
from .sampling import sampling
from .skip import skip
from .table import Importance

__all__ = ["Importance", "Pruned", "importance", "prune", "pruned", "sampling", "shallow", "skip"]
