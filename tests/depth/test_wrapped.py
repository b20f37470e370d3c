"""Models whose parameters are not all their own are refused, and are as they were."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import stochastic_depth as sd

from .small import net, x_for_net


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def wrap(how):
    model = net()
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "fsdp1":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("ddp", "in DistributedDataParallel: give the module inside"),
        ("fsdp1", "in a FullyShardedDataParallel: do this before it is wrapped"),
        ("fsdp2", "in a FSDPNet: do this before it is wrapped"),
    ],
)
@pytest.mark.filterwarnings("ignore:FSDP is switching to use")  # one rank has nothing to shard
def test_a_wrapped_model_is_refused(how, match):
    model, x = wrap(how), x_for_net()
    before = model(x)
    names = [name for name, _ in model.named_modules()]

    def skipped():
        with sd.skip(model, "blocks.1", x):
            pass

    for act in (
        skipped,
        lambda: sd.prune(model, keep=3, example_inputs=x),
        lambda: sd.shallow(model, keep=3, example_inputs=x),
        lambda: sd.importance(model, [x]),
    ):
        with pytest.raises(ValueError, match=match):
            act()
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(model(x), before)


def test_what_is_no_plain_model_is_refused():
    class DistributedLike(DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

        def train(self, mode=True):
            return self

    with pytest.raises(ValueError, match="DistributedDataParallel"):
        sd.prune(DistributedLike(net()), keep=3)
    with pytest.raises(ValueError, match="OptimizedModule"):
        sd.prune(torch.compile(net(), backend="eager"), keep=3, example_inputs=x_for_net())
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        sd.prune("model", keep=3)
    with pytest.raises(ValueError, match="meta device"):
        sd.prune(net().to("meta"), keep=3, example_inputs=torch.randn(2, 4, device="meta"))
