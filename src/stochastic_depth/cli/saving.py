"""A model as it is left for use: its weights, and all it takes to use them beside them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stochastic_depth as sd
from stochastic_depth_command import command_line

from . import models
from .errors import CommandError, first_line
from .files import read_tensors, write_json
from .task import Task

HEAD = """\
import json, pathlib, torch
from torchvision.transforms import v2

folder = pathlib.Path("{path}")
info = json.loads((folder / "model.json").read_text())
state = torch.load(folder / "model.pt", weights_only=True)
{code}
"""
PRUNED_HEAD = """\
import torch
import stochastic_depth as sd
from torchvision.transforms import v2

saved = torch.load("{path}", weights_only=True)
info, state = saved["info"], saved["state"]
{code}
size = info["image_size"]
sd.prune(model, remove=info["removed"], example_inputs=torch.zeros(1, 3, size, size))
"""
TAIL = """\
model.load_state_dict(state)
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
NEEDED = {"model", "classes", "image_size", "mean", "std", "config"}


def snippet(head: str, path: Path, code: str, classes: int) -> str:
    """The lines of Python that load what is in ``path``."""
    path_text = path.resolve().as_posix()
    return head.format(path=path_text, code=code.replace("{classes}", str(classes))) + TAIL


def write(path: Path, content: Any) -> None:
    """Write all of a file of torch.save, or nothing."""
    draft = path.with_name(f"{path.name}.part")
    torch.save(content, draft)
    draft.replace(path)


def save(folder: Path, task: Task, state: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write model.pt, and model.json with what is known of it."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "model.pt", state)
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
        "snippet": snippet(HEAD, folder, network.code, len(classes)),
    }
    write_json(folder / "model.json", info)


@dataclass(frozen=True)
class Saved:
    """A model that a run left in a folder, or `prune` in a file."""

    path: Path
    info: dict[str, Any]

    def network(self) -> models.Network:
        """The model, to be used, and how it is made."""
        classes = len(self.info["classes"])
        network = models.load(
            self.info["model"], weights="none", classes=classes, config=self.info["config"]
        )
        file = self.path if self.path.is_file() else self.path / "model.pt"
        state = read(file)
        try:
            if removed := self.info.get("removed"):
                sd.prune(network.model, remove=removed, example_inputs=self.example())
            network.model.load_state_dict(state["state"] if file == self.path else state)
        except (RuntimeError, TypeError, ValueError) as error:
            raise CommandError(f"{file}: cannot be used ({first_line(error)})") from error
        network.model.eval()
        return network

    def example(self) -> Tensor:
        """An image of the model's size, which is empty."""
        return torch.zeros(1, 3, self.info["image_size"], self.info["image_size"])


def read(path: Path) -> Any:
    """What is in a file of torch.save."""
    try:
        return read_tensors(path)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise CommandError(f"{path}: cannot be used ({first_line(error)})") from error


def check_info(path: Path, info: Any) -> dict[str, Any]:
    """What is known of a model, if all that is needed is among it."""
    if not isinstance(info, dict):
        raise CommandError(f"{path}: says nothing of a model")
    if missing := NEEDED - info.keys():
        raise CommandError(f"{path}: lacks {', '.join(sorted(missing))}")
    return info


def find(run: Path) -> Saved:
    """The model in a file or folder, or the one of a run that had the lowest validation error."""
    if run.is_file():
        found = read(run)
        if not isinstance(found, dict) or not {"info", "state"} <= found.keys():
            raise CommandError(f"RUN {run}: is no file that stochastic-depth prune wrote")
        return Saved(run, check_info(run, found["info"]))
    if not run.is_dir():
        raise CommandError(f"RUN {run}: no such folder; give the folder of a run of finetune")
    paths = [run / "model.json"] if (run / "model.json").is_file() else run.glob("*/model.json")
    left = []
    for path in sorted(paths):
        try:
            info = check_info(path, json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise CommandError(f"{path}: cannot be read ({first_line(error)})") from error
        if not (path.parent / "model.pt").is_file():
            raise CommandError(f"{path}: has no model.pt beside it")
        left.append(Saved(path.parent, info))
    if not left:
        raise CommandError(
            f"RUN {run}: holds no finished model; if the run was interrupted, continue it with "
            + command_line("finetune", "--resume", run)
        )
    return min(left, key=lambda saved: saved.info.get("validation_error", 1.0))
