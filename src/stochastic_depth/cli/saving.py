"""A model as it is left for use: its weights, and all it takes to use them beside them."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .errors import CommandError, first_line
from .files import write_json
from .task import Task

SNIPPET = """\
import json, pathlib, torch
from torchvision.transforms import v2

folder = pathlib.Path("{folder}")
info = json.loads((folder / "model.json").read_text())
{code}
model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
model.eval()
prepare = v2.Compose(
    [
        v2.RGB(),
        v2.Resize(info["image_size"]),
        v2.CenterCrop(info["image_size"]),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(info["mean"], info["std"]),
    ]
)
"""


def save(folder: Path, task: Task, state: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write model.pt, and model.json with what is known of it."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / "model.pt.part"
    torch.save(state, draft)
    draft.replace(folder / "model.pt")
    network, classes = task.source, task.splits.classes
    info = {
        "model": task.settings.model,
        "classes": list(classes),
        "image_size": task.image_size,
        "preprocessing": "resize the shorter side to image_size, crop the centre, scale to [0, 1], "
        "subtract mean, divide by std",
        "mean": list(network.mean),
        "std": list(network.std),
        **about,
        "config": network.config,
        "snippet": SNIPPET.format(
            folder=folder.resolve().as_posix(),
            code=network.code.replace("{classes}", str(len(classes))),
        ),
    }
    write_json(folder / "model.json", info)


@dataclass(frozen=True)
class Saved:
    """A model that a run left."""

    folder: Path
    info: dict[str, Any]

    def load(self) -> nn.Module:
        """The model, to be used."""
        network = models.load(
            self.info["model"],
            weights="none",
            classes=len(self.info["classes"]),
            config=self.info["config"],
        )
        path = self.folder / "model.pt"
        try:
            network.model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise CommandError(f"{path}: cannot be used ({first_line(error)})") from error
        return network.model.eval()


def find(run: Path) -> Saved:
    """The model in a folder, or the one of a run that had the lowest validation error."""
    if not run.is_dir():
        reason = "is a file" if run.exists() else "no such folder"
        raise CommandError(f"RUN {run}: {reason}; give the folder of a run of finetune")
    paths = [run / "model.json"] if (run / "model.json").is_file() else run.glob("*/model.json")
    found = []
    for path in sorted(paths):
        try:
            info = json.loads(path.read_text())
            missing = {"model", "classes", "image_size", "mean", "std", "config"} - info.keys()
        except (OSError, ValueError, AttributeError) as error:
            raise CommandError(f"{path}: cannot be read ({first_line(error)})") from error
        if missing:
            raise CommandError(f"{path}: lacks {', '.join(sorted(missing))}")
        if not (path.parent / "model.pt").is_file():
            raise CommandError(f"{path}: has no model.pt beside it")
        found.append(Saved(path.parent, info))
    if not found:
        raise CommandError(
            f"RUN {run}: holds no finished model; if the run was interrupted, continue it with "
            f"stochastic-depth finetune --resume {run}"
        )
    return min(found, key=lambda saved: saved.info.get("validation_error", 1.0))
