"""nn.TransformerEncoder in evaluation, where torch has a way of its own for padded batches."""

import copy

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")


@pytest.fixture
def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    padded = torch.zeros(3, 5, dtype=torch.bool)
    padded[0, 3:] = True
    return {"src": torch.randn(3, 5, 8), "src_key_padding_mask": padded}


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch)[~batch["src_key_padding_mask"]]


@pytest.mark.parametrize("given", [True, False])
def test_the_papers_scaling_weighs_there_too(
    encoder: nn.Module, batch: dict[str, Tensor], given: bool
) -> None:
    inputs = batch if given else None
    sd.apply(encoder, 0.5, scale="eval", schedule="uniform", example_inputs=inputs)
    expected = outputs(encoder.eval(), batch).detach()
    with torch.no_grad():
        torch.testing.assert_close(outputs(encoder, batch), expected)
    with torch.no_grad():
        assert not torch.allclose(outputs(sd.remove(encoder), batch), expected, atol=1e-2)


def test_a_pretrained_encoder_keeps_torchs_way(
    encoder: nn.Module, batch: dict[str, Tensor]
) -> None:
    plain = copy.deepcopy(encoder)
    sd.apply(encoder, 0.5, example_inputs=batch)
    with torch.no_grad():
        assert torch.equal(outputs(encoder.eval(), batch), outputs(plain, batch))


@torch.no_grad()
def test_samples_of_depth_and_skipped_layers(encoder: nn.Module, batch: dict[str, Tensor]) -> None:
    sd.apply(encoder, 0.5, schedule="uniform", example_inputs=batch).eval()
    whole = outputs(encoder, batch)
    with sd.sampling(encoder):
        passes = torch.stack([outputs(encoder, batch) for _ in range(8)])
    assert passes.std(0).max() > 0.1
    expected = outputs(encoder.layers[1], {"src": batch["src"], **_mask(batch)})
    for model in (encoder, sd.remove(copy.deepcopy(encoder))):
        with sd.skip(model, ["layers.0"], batch):
            torch.testing.assert_close(outputs(model, batch), expected)
        torch.testing.assert_close(outputs(model, batch), whole)


@torch.no_grad()
@pytest.mark.parametrize("layer", [False, True])
def test_it_weighs_where_it_is_compiled(
    encoder: nn.Module, batch: dict[str, Tensor], layer: bool
) -> None:
    sd.apply(encoder, 0.5, scale="eval", schedule="uniform", example_inputs=batch).eval()
    model = encoder.layers[0] if layer else encoder
    expected = outputs(model, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(outputs(compiled, batch), expected)


def _mask(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"src_key_padding_mask": batch["src_key_padding_mask"]}


class Bare(nn.Module):
    """Layers without their encoder, none of which is trained."""

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        super().__init__()
        self.layers = encoder.layers
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_that_are_frozen_weigh_and_drop_too(
    encoder: nn.TransformerEncoder, batch: dict[str, Tensor]
) -> None:
    model, x = Bare(encoder).eval(), batch["src"]
    plain = model(x)
    sd.apply(model, 0.5, scale="eval", schedule="uniform", example_inputs=x).eval()
    expected = model(x.clone().requires_grad_()).detach()
    torch.testing.assert_close(model(x), expected)
    assert not torch.allclose(plain, expected, atol=1e-2)
    with sd.sampling(model):
        assert torch.stack([model(x) for _ in range(8)]).std(0).max() > 0.1


class Own(nn.TransformerEncoder):
    """Its own layers, by another name, and forward."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


def test_a_subclass_may_be_something_else() -> None:
    model, x = Own(), torch.randn(3, 5, 8)
    sd.apply(model, 0.5, scale="eval", example_inputs=x)
    assert model.eval()(x).shape == x.shape
