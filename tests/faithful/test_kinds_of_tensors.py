"""Models whose tensors are sparse, packed or nested, and gradients that are taken all at once."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import stochastic_depth as sd

from .twins import assert_weighed, data, net, twins

MODES = ["batch", "row", "subset"]


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return x + torch.sparse.mm(edges, self.f(x))


class Buffered(nn.Module):
    """Keeps its edges; or something that it never reads."""

    def __init__(self, edges: Tensor, read: bool) -> None:
        super().__init__()
        self.graph, self.read = Graph(), read
        self.register_buffer("edges", edges)

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(x, self.edges if self.read else torch.eye(6).to(x).to_sparse())


LAYOUTS = {
    "coo": lambda: (data(6, 6, seed=3) > 0).double().to_sparse(),
    "csr": lambda: (data(6, 6, seed=3) > 0).double().to_sparse_csr(),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", ["given", "a buffer", "an unread buffer"])
def test_a_model_may_have_sparse_tensors(way: str, layout: str, mode: str) -> None:
    edges = LAYOUTS[layout]()
    model = net(Graph) if way == "given" else net(Buffered, edges, way == "a buffer")
    inputs = (data(), edges) if way == "given" else (data(),)
    plain = model(*inputs)
    with (
        pytest.warns(UserWarning, match="samples cannot be selected") if mode != "batch" else _no()
    ):
        sd.apply(model, 0.5, mode=mode, schedule="uniform", example_inputs=inputs, seed=0)
    torch.testing.assert_close(model.eval()(*inputs), plain)
    model.train()
    steps = [model(*inputs) for _ in range(12)]
    (branch,) = sd.branches(model)
    assert 0 < branch.dropped < branch.decided
    if mode == "batch":
        kept = data() + 2 * (plain - data())
        assert all(torch.equal(y, data()) or torch.allclose(y, kept) for y in steps)


def _no() -> torch.no_grad:
    return torch.no_grad()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is None:
            return x + self.gru(x)[0]
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = self.gru(packed)
        return x + pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])[0]


def test_what_returns_a_packed_sequence_is_refused_and_runs() -> None:
    x, lengths = data(4, 3, 4), torch.tensor([3, 1, 2, 3])
    with pytest.raises(ValueError, match="cannot be taken apart"):
        sd.apply(net(Recurrent), 0.5, example_inputs=(x, lengths))
    model = net(Recurrent)
    expected = model(x, lengths)
    sd.apply(model, 1.0, example_inputs=x)
    with pytest.warns(UserWarning, match="gru returns an object that cannot be taken apart"):
        torch.testing.assert_close(model(x, lengths), expected)
    assert torch.equal(model(x), x)


class Branchy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.g(torch.tanh(self.f(x)))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("mode", MODES)
def test_gradients_may_be_taken_all_at_once(mode: str) -> None:
    ours, plain = twins(nn.Sequential(net(Branchy), net(Branchy, seed=1)), data(), mode=mode, p=0.5)
    for step in range(3):
        x = data(seed=step).requires_grad_()
        out = ours(x)
        (batched,) = torch.autograd.grad(
            out, x, torch.eye(24).double().view(24, 6, 4), is_grads_batched=True, retain_graph=True
        )
        single = [torch.autograd.grad(y, x, retain_graph=True)[0] for y in out.flatten()]
        torch.testing.assert_close(batched, torch.stack(single))
    ours, plain = twins(net(Branchy), data(), mode=mode, p=0.5)
    if mode != "subset":
        assert_weighed(ours, plain, data())
