"""``sampling``: drop in evaluation, too, for Monte-Carlo predictions."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..applied import branches
from ..drop.force import sampled

__all__ = ["sampling"]


@contextmanager
def sampling(model: nn.Module) -> Iterator[None]:
    """Drop in evaluation as in training, on this thread: several passes give a distribution.

    BatchNorm and dropout behave as in evaluation. Decisions are drawn as in training, and the
    counts of the branches don't change.

    Args:
        model: a model with stochastic depth.

    Raises:
        ValueError: no branch of the model is ever dropped.

    Example:
        >>> import torch, torchvision, stochastic_depth as sd
        >>> model = sd.apply(torchvision.models.resnet18(), p=0.5).eval()
        >>> x = torch.randn(2, 3, 64, 64)
        >>> with sd.sampling(model), torch.no_grad():
        ...     passes = torch.stack([model(x).softmax(-1) for _ in range(8)])
        >>> passes.mean(0).shape, passes.std(0).shape
        (torch.Size([2, 1000]), torch.Size([2, 1000]))

    Reference:
        Gal and Ghahramani, Dropout as a Bayesian Approximation, ICML 2016 (arXiv:1506.02142), with
        the decisions of stochastic depth for those of dropout.
    """
    own = branches(model)
    if not any(branch.p > 0.0 for branch in own):
        raise ValueError(
            f"{type(model).__name__} has no branch with a rate above 0: apply stochastic depth "
            "first, with example_inputs where the branches are not found without"
        )
    with sampled(own):
        yield
