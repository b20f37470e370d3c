"""Finding and skipping against the interpreter, on random networks."""

import copy
import warnings
import zlib
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.applied import sites
from stochastic_depth.drop.draws import Draws

from .interpreter import Interpreter, Path, droppable
from .networks import WIDTH, Network, build, networks

MODES = st.sampled_from(["batch", "row", "subset"])
ROWS = st.sampled_from([3, WIDTH, 7])
RATES = (0.1, 0.3, 0.6)


def rate_of(block: str) -> float:
    """Blocks have different rates."""
    return RATES[sum(map(ord, block)) % len(RATES)]


class Numbers(Draws):
    """Decisions that depend on a seed, on the branch and on how often it was decided before."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.calls: Counter[str] = Counter()

    def number(self, name: str) -> int:
        self.calls[name] += 1
        return zlib.crc32(repr((self.seed, name, self.calls[name])).encode())

    def decide(self, branches, block):
        numbers = [self.number(branch.name) for branch in branches]
        return [
            n / 2**32 < b.p if b.mode == "batch" else n
            for n, b in zip(numbers, branches, strict=True)
        ]


def toss(mode: str, seed: int, names: dict[Path, str]):
    """The same decisions for the interpreter, as they are documented."""
    numbers = Numbers(seed)

    def decide(path: Path, rows: int) -> tuple[Tensor, float]:
        p, n = rate_of(path[0]), numbers.number(names[path])
        if mode == "batch":
            return torch.tensor(n / 2**32 >= p).expand(rows), 1 / (1 - p)
        source = torch.Generator().manual_seed(n)
        if mode == "row":
            return torch.rand(rows, generator=source, dtype=torch.float64) >= p, 1 / (1 - p)
        k = round(rows * (1 - p))
        kept = torch.zeros(rows, dtype=torch.bool)
        kept[torch.randperm(rows, generator=source)[:k]] = True
        return kept, rows / k

    return decide


def named(model: nn.Module, paths: set[Path]) -> dict[Path, str]:
    """The branches by their place: those of one block are in the order of their statements."""
    names: dict[Path, str] = {}
    for block in {path[0] for path in paths}:
        own = sorted(path for path in paths if path[0] == block)
        found = [b.name for b in sd.branches(model) if b.name.partition(":")[0] == block]
        names |= dict(zip(own, found, strict=True))
    return names


def inputs(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, other = torch.randn(2, rows, WIDTH, dtype=torch.float64, generator=generator)
    return x, other


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (output.tanh().sum() if output.requires_grad else output.sum().requires_grad_()).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        # float64 rounding, of sums in another order
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-9)


def none_kept(path: Path, rows: int) -> tuple[Tensor, float]:
    """The decisions at p = 1."""
    return torch.zeros(rows, dtype=torch.bool), 0.0


def count_rows(model: nn.Module) -> Counter[str]:
    """Filled with the rows that each linear layer computes (on the meta device, none)."""
    rows: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda _, args, __, name=name: rows.update(
                    {} if args[0].is_meta else {name: len(args[0])}
                )
            )
    return rows


def check(network: Network, mode: str, seed: int, rows: int) -> None:
    if mode != "batch" and network.train_norm:
        network = Network(network.blocks, network.order, network.long_skip, train_norm=False)
    x, other = inputs(rows)
    plain = build(network)
    expected = droppable(network)
    model = copy.deepcopy(plain)
    keys = list(model.state_dict())
    if not expected:
        with pytest.raises(ValueError, match="no residual branch"):
            sd.apply(model, 0.2, example_inputs=(x, other))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # rows that cannot be told apart
        sd.apply(model, 0.2, mode=mode, example_inputs=(x, other))
        blocks = Counter(branch.name.split(":")[0] for branch in sd.branches(model))
        assert blocks == Counter(block for block, _, _ in expected)
        for branch in sd.branches(model):
            branch.p = rate_of(branch.name.split(":")[0])
        assert list(model.state_dict()) == keys

        with torch.no_grad():
            ours, theirs = copy.deepcopy(model).eval(), copy.deepcopy(plain).eval()
            assert torch.equal(ours(x, other), theirs(x, other))

        twin, numbers = copy.deepcopy(model), Numbers(seed)
        for site in sites(twin):
            site.draws = numbers
        counted = count_rows(twin)
        output = twin(x, other)
        reference = copy.deepcopy(plain)
        interpreter = Interpreter(
            network,
            reference,
            expected,
            toss(mode, seed, named(model, expected)),
            mode != "batch",
            other_known=True,
        )
        wanted = interpreter.run(x, other)
        assert_same({"output": output.detach()}, {"output": wanted.detach()})
        # Where values vanish in the run that is watched, samples are masked to be on the safe side.
        selected = all(branch.place is not None for branch in sd.branches(model))
        assert counted == interpreter.rows or (mode != "batch" and not selected)
        assert_same(gradients(twin, output), gradients(reference, wanted))
        assert_same(dict(twin.named_buffers()), dict(reference.named_buffers()))

        for branch in sd.branches(model):
            branch.p = 0.0
        kept, reference = copy.deepcopy(model), copy.deepcopy(plain)
        outputs = kept(x, other), reference(x, other)
        assert torch.equal(*outputs)
        ours, theirs = gradients(kept, outputs[0]), gradients(reference, outputs[1])
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

        for branch in sd.branches(model):
            branch.p = 1.0
        reference = copy.deepcopy(plain)
        nothing = Interpreter(network, reference, expected, none_kept, True, True)
        wanted = nothing.run(x, other)
        counted = count_rows(model)
        output = model(x, other)
        assert_same({"output": output.detach()}, {"output": wanted.detach()})
        assert counted == nothing.rows
        assert_same(gradients(model, output), gradients(reference, wanted))

        sd.remove(model)
        assert sd.branches(model) == []
        model.load_state_dict(plain.state_dict())  # BatchNorm's statistics
        assert torch.equal(model.eval()(x, other), plain.eval()(x, other))


COMMON = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)


@settings(COMMON, derandomize=True, max_examples=40)
@given(networks(), MODES, st.integers(0, 1000), ROWS)
def test_generated_networks_do_what_the_interpreter_does(network, mode, seed, rows):
    check(network, mode, seed, rows)


@pytest.mark.zoo
@pytest.mark.timeout(3600)
@settings(COMMON, max_examples=10_000, database=None)
@given(networks(), MODES, st.integers(0, 1000), ROWS)
def test_ten_thousand_generated_networks(network, mode, seed, rows):
    check(network, mode, seed, rows)
