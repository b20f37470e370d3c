"""transformers' models: the configuration follows, and nothing of this library is needed after."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch

import stochastic_depth as sd
from stochastic_depth.depth.looks import look_at
from zoo.transformers_models import FAMILIES, build

from .small import run, skips_as_it_prunes

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

BY_NAME = {family.name: family for family in FAMILIES}
DECODERS = ["llama", "gpt2", "gemma2", "smollm3"]
QUICK = ["bert", "vit", "convnext"]
MORE = [
    "bart", "t5", "segformer", "whisper", "wav2vec2", "modernbert",
    "gpt_neox", "mistral", "mixtral", "qwen2", "qwen3", "olmo2", "phi3", "opt", "bloom", "falcon",
    "deepseek_v3", "mamba", "rwkv", "codegen", "glm", "gemma3", "lfm2", "gpt_oss", "roberta",
    "electra", "deberta_v2", "distilbert", "xlm_roberta", "mpnet", "mt5", "longt5", "marian",
    "pegasus", "led", "fsmt", "m2m_100", "dinov2", "deit", "beit", "poolformer",
    "pvt_v2", "resnet", "regnet", "clip_vision", "siglip_vision", "videomae", "hubert", "wavlm",
    "speech_to_text", "vilt", "clip_text", "audio_spectrogram_transformer",
]  # fmt: skip


def made(name):
    model, inputs = build(BY_NAME[name])
    return model.eval(), inputs


def middle(model, inputs, of):
    look = look_at(model, inputs)
    names = list(look.wholes) if of == "blocks" else [b.name for b in look.found.branches]
    return names[len(names) // 2]


@pytest.mark.parametrize(
    "name", [*DECODERS, *QUICK, *[pytest.param(name, marks=pytest.mark.zoo) for name in MORE]]
)
def test_families_prune_as_they_skip(name, tmp_path):
    model, inputs = made(name)
    pruned = skips_as_it_prunes(model, middle(model, inputs, "blocks"), inputs)
    pruned.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    for a, b in zip(run(loaded, inputs), run(pruned, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    pruned = skips_as_it_prunes(model, middle(model, inputs, "branches"), inputs)
    fresh = sd.prune(made(name)[0], remove=sd.pruned(pruned), example_inputs=inputs)
    fresh.load_state_dict(pruned.state_dict())


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("keep", [range(1), [0, 2]])
def test_generation_is_the_same_with_and_without_a_cache(name, keep):
    model, inputs = made(name)
    view = sd.shallow(model, keep=keep, example_inputs=inputs)
    prompt = torch.arange(3, 15).reshape(2, 6)
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    outputs = [view.generate(prompt, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*outputs)
    for one in prompt.split(1):
        greedy = model.generate(one, **options)
        assisted = model.generate(one, assistant_model=view, **options)
        assert torch.equal(assisted, greedy)


@pytest.mark.parametrize("name", DECODERS[:2])
def test_generation_without_single_branches(name):
    model, inputs = made(name)
    prompt = torch.arange(3, 15).reshape(2, 6)
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for branch in sd.importance(model, [inputs]).ranking:
        view = sd.shallow(model, remove=branch, example_inputs=inputs)
        outputs = [view.generate(prompt, use_cache=cache, **options) for cache in (True, False)]
        assert torch.equal(*outputs), branch
        if "attn" not in branch:  # transformers crops the caches of all attentions
            greedy = model.generate(prompt[:1], **options)
            assisted = model.generate(prompt[:1], assistant_model=view, **options)
            assert torch.equal(assisted, greedy), branch
        assert view.config.pruned_branches == [branch]


def test_skipping_attention_that_writes_a_cache_is_an_error():
    model, inputs = made("llama")
    prompt = torch.arange(3, 15).reshape(2, 6)
    with sd.skip(model, "model.layers.1:self_attn", inputs):
        model.generate(prompt, max_new_tokens=4, use_cache=False)
        with pytest.raises(RuntimeError, match="cannot be left out of a call in this form"):
            model.generate(prompt, max_new_tokens=4)


def test_loads_without_this_library(tmp_path):
    model, inputs = made("llama")
    pruned = sd.prune(model, remove="model.layers.1", example_inputs=inputs)
    pruned.save_pretrained(tmp_path)
    prompt = torch.arange(3, 9)[None]
    tokens = pruned.generate(prompt, max_new_tokens=12, do_sample=False)[0].tolist()
    code = (
        "import sys, json, torch\n"
        "try:\n"
        "    import torchvision\n"
        "except RuntimeError:  # its compiled operators cannot be loaded\n"
        "    for name in ('nms', 'qnms'):\n"
        "        rule = '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'\n"
        "        torch.library.define(f'torchvision::{name}', rule)\n"
        "import transformers\n"
        "m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "out = m.generate(torch.arange(3, 9)[None], max_new_tokens=12, do_sample=False)\n"
        "assert not any(n.startswith('stochastic_depth') for n in sys.modules)\n"
        "assert [l.self_attn.layer_idx for l in m.model.layers] == [0, 1]\n"
        "print(json.dumps(out[0].tolist()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == tokens


def test_entries_for_each_layer_are_indexed_and_not_cut():
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = transformers.Gemma2Config(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=3,
        layer_types=kinds,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config).eval()
    inputs = {"input_ids": torch.arange(3, 17).reshape(2, 7), "use_cache": False}
    pruned = skips_as_it_prunes(model, ["model.layers.0", "model.layers.2"], inputs)
    assert pruned.config.layer_types == ["full_attention"] * 2
    assert pruned.config.num_hidden_layers == 2
    assert model.config.num_hidden_layers == 4
    assert model.config.layer_types == kinds


def test_encoder_and_decoder_follow_by_themselves():
    model, inputs = made("t5")
    pruned = sd.prune(copy.deepcopy(model), remove="decoder.block.1", example_inputs=inputs)
    assert (pruned.config.num_layers, pruned.config.num_decoder_layers) == (3, 2)
    pruned = sd.prune(pruned, remove="encoder.block.2", example_inputs=inputs)
    assert (pruned.config.num_layers, pruned.config.num_decoder_layers) == (2, 2)
    model, inputs = made("bart")
    pruned = sd.prune(model, remove="encoder.layers.0", example_inputs=inputs)
    assert (pruned.config.encoder_layers, pruned.config.decoder_layers) == (2, 3)


def test_another_model_with_the_same_configuration_keeps_it():
    model, inputs = made("llama")
    other = type(model)(model.config)
    pruned = sd.prune(model, keep=2, example_inputs=inputs)
    assert (pruned.config.num_hidden_layers, other.config.num_hidden_layers) == (2, 3)
    own = {id(m.config) for m in pruned.modules() if hasattr(m, "config")}
    assert own == {id(pruned.config)}


def test_lists_that_say_nothing_of_layers_are_left_alone():
    model, inputs = made("bert")
    n = model.config.num_hidden_layers
    model.config.class_names = [f"class {i}" for i in range(n)]
    pruned = sd.prune(model, remove="encoder.layer.1", example_inputs=inputs)
    assert len(pruned.config.class_names) == n


def test_lists_by_layer_are_cut_whatever_their_names():
    class Config(transformers.PretrainedConfig):
        model_type = "windows"

        def __init__(self, num_hidden_layers=4, windows=(1, 9, 1, 9), labels=(0, 1, 2, 3), **other):
            super().__init__(**other)
            self.num_hidden_layers = num_hidden_layers
            self.windows, self.labels = list(windows), list(labels)

    class Layer(torch.nn.Module):
        def __init__(self, window):
            super().__init__()
            self.window, self.body = window, torch.nn.Linear(8, 8)  # longer than the examples

        def forward(self, x):
            return x + self.body(x)

    class Windows(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            windows = config.windows[: config.num_hidden_layers]
            self.layers = torch.nn.ModuleList(map(Layer, windows))
            self.post_init()

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = Windows(Config()).eval()
    sd.prune(model, remove=["layers.0", "layers.2"], example_inputs=torch.randn(2, 8))
    assert model.config.windows == [9, 9]
    assert model.config.labels == [0, 1, 2, 3]


class Wrapper(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, **inputs):
        return self.inner(**inputs).logits


def test_configurations_of_models_inside_others_are_tried():
    model, inputs = made("jamba")
    outer = Wrapper(model).eval()
    config = model.config.to_dict()
    with pytest.raises(ValueError, match="makes another model than the pruned one"):
        sd.prune(outer, remove="inner.model.layers.1", example_inputs=inputs)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("is_inside", [False, True])
def test_removed_branches_are_listed_by_their_names_of_now(is_inside):
    model, inputs = made("llama")
    inputs = {**inputs, "use_cache": False}
    outer, prefix = (Wrapper(model).eval(), "inner.") if is_inside else (model, "")
    sd.prune(outer, remove=f"{prefix}model.layers.2:self_attn", example_inputs=inputs)
    sd.prune(outer, remove=f"{prefix}model.layers.0", example_inputs=inputs)
    assert model.config.pruned_branches == ["model.layers.1:self_attn"]
    assert model.config.num_hidden_layers == 2
    again = type(model)(copy.deepcopy(model.config)).eval()
    sd.prune(again, remove=again.config.pruned_branches, example_inputs=inputs)
    assert again.config.pruned_branches == model.config.pruned_branches
    again.load_state_dict(model.state_dict())
    assert torch.equal(run(again, inputs)[0], run(model, inputs)[0])
    sd.prune(outer, remove=f"{prefix}model.layers.1", example_inputs=inputs)
    assert not hasattr(model.config, "pruned_branches")


@pytest.mark.parametrize(
    ("name", "block", "match"),
    [
        ("jamba", "model.layers.1", "makes another model than the pruned one"),
        ("swin", "encoder.layers.1.blocks.0", "gives something else"),
        ("mobilenet_v2", "layer.8", "no entry of MobileNetV2Config says"),
    ],
)
def test_configurations_that_cannot_follow_are_refused(name, block, match):
    model, inputs = made(name)
    before, config = run(model, inputs), model.config.to_dict()
    with pytest.raises(ValueError, match=match) as error:
        sd.prune(model, remove=block, example_inputs=inputs)
    assert "config=False" in str(error.value)
    assert model.config.to_dict() == config
    assert all(torch.equal(a, b) for a, b in zip(run(model, inputs), before, strict=True))
    pruned = sd.prune(model, remove=block, example_inputs=inputs, config=False)
    assert pruned.config.to_dict() == config


@pytest.mark.parametrize("branch", ["", "base_model.model.model.layers.2:self_attn"])
def test_adapters_of_peft_inside(branch):
    peft = pytest.importorskip("peft")
    model, inputs = made("llama")
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora).eval()
    what = ["base_model.model.model.layers.1", *filter(None, [branch])]
    with sd.skip(adapted, what, inputs):
        skipped = run(adapted, inputs)
    sd.prune(adapted, remove=what, example_inputs=inputs)
    assert all(torch.equal(a, b) for a, b in zip(run(adapted, inputs), skipped, strict=True))
    merged = adapted.merge_and_unload().eval()
    assert len(merged.model.layers) == merged.config.num_hidden_layers == 2
    torch.testing.assert_close(run(merged, inputs)[0], skipped[0])
