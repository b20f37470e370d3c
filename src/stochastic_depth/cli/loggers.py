"""Lightning's loggers, by name."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import CommandError

NEEDS = {"csv": (), "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}


def check_logger(name: str | None) -> None:
    """Refuse a logger whose package is missing, before anything is loaded."""
    packages = NEEDS[name] if name else ()
    if packages and not any(find_spec(package) for package in packages):
        raise CommandError(
            f"--logger {name}: needs a package that is missing; pip install {packages[0]}"
        )


def close_logger(name: str | None, logger: Any) -> None:
    """End the run of Weights & Biases, or the next seed would go on with it."""
    if name == "wandb":
        logger.experiment.finish()


def make_logger(name: str | None, folder: Path, seed: int) -> Any:
    """The logger of a seed; names of metrics begin with that of the variant."""
    if name is None:
        return None
    from lightning.pytorch import loggers

    run = f"seed{seed}"
    for part in range(2, 1_000):  # a resumed run would delete what the first part logged
        if not (folder / "logs" / run).exists():
            break
        run = f"seed{seed}-part{part}"
    if name == "csv":
        return loggers.CSVLogger(folder, "logs", run)
    if name == "tensorboard":
        return loggers.TensorBoardLogger(folder, "logs", run)
    return loggers.WandbLogger(f"{folder.resolve().name}-{run}", folder, project="stochastic-depth")
