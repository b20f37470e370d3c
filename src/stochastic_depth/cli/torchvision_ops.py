"""Importing torchvision beside a torch that its compiled operators were not built for."""

import torch

BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def ensure_torchvision() -> None:
    """Import torchvision, also where its compiled operators cannot be loaded.

    torchvision gives shape rules to two operators as it is imported, and that fails if the
    operators don't exist, as in a CUDA build of torchvision beside a CPU build of torch. Its
    models and transforms use neither of them, so their declarations are enough.
    """
    try:
        import torchvision
    except RuntimeError:
        torch.library.define("torchvision::nms", BOXES)
        torch.library.define("torchvision::qnms", BOXES)
        import torchvision  # noqa: F401
