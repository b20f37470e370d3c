"""A first session with the installed package, where torch is and nothing else.

`make test-wheel` runs it in an environment of its own, away from the sources.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import stochastic_depth as sd


def network() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return nn.Sequential(encoder, nn.Flatten(), nn.Linear(5 * 16, 3))


def main() -> None:
    assert "site-packages" in str(sd.__file__), f"{sd.__file__} is not the installed package"
    model, x, y = network(), torch.randn(8, 5, 16), torch.randint(3, (8,))
    sd.apply(model, p=0.5, example_inputs=x)
    print(sd.summary(model, x))
    verification = sd.verify(model, x)
    print(verification)
    assert verification.passed
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(10):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(branch.dropped for branch in sd.branches(model)) > 0
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder, "model.pt"))
        plain = network()
        plain.load_state_dict(torch.load(Path(folder, "model.pt"), weights_only=True))
    assert torch.equal(plain.eval()(x), model.eval()(x))
    print(f"stochastic-depth {sd.__version__}, torch {torch.__version__}, {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
