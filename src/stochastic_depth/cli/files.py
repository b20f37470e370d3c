"""Files that are whole or not there."""

import json
from pathlib import Path
from typing import Any

import torch

from .errors import first_line


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write all of the file or nothing."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(path)


def read_tensors(path: Path) -> Any:
    """What torch.save wrote, if there is nothing in it but tensors.

    Raises:
        OSError, ValueError: it cannot be opened; it is anything else, or damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged bytes make the unpickler raise whatever they like
        raise ValueError(first_line(error)) from error
