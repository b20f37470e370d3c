"""Tiny random models of transformers families, with inputs for them. Nothing is downloaded."""

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

LAYERS = 3

# What makes a configuration small, under the names that families have for it. Only those that a
# family's configuration has are set.
SMALL: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_dim"], 32),
    **dict.fromkeys(["embedding_size", "word_embed_proj_dim", "projection_dim"], 32),
    **dict.fromkeys(
        ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"], LAYERS
    ),
    **dict.fromkeys(["decoder_layers", "num_decoder_layers", "num_encoder_layers"], LAYERS),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads"], 2),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"], 48),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size"], 48),
    **dict.fromkeys(["head_dim", "d_kv"], 8),
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "image_size": 32,
    "patch_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


@dataclass(frozen=True)
class Family:
    """A family: ``classes`` are the configuration's and the model's names in transformers.

    ``branches`` is the expected number; ``reason`` says where it comes from.
    """

    name: str
    config: str
    model: str
    branches: int
    reason: str
    inputs: str = "text"
    overrides: dict[str, Any] = field(default_factory=dict)


def build(family: Family) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny random model of the family, and what to call it with."""
    transformers = importlib.import_module("transformers")
    config_class = getattr(transformers, family.config)
    default = config_class()
    small = {k: v for k, v in SMALL.items() if _settable(default, k)} | family.overrides
    torch.manual_seed(0)
    model = getattr(transformers, family.model)(config_class(**small))
    return model, INPUTS[family.inputs]()


def _settable(config: Any, name: str) -> bool:
    if name in type(config).attribute_map:
        return False  # another name of what is set already
    derived = getattr(type(config), name, None)
    return hasattr(config, name) and not (isinstance(derived, property) and derived.fset is None)


def _tokens(length: int = 7) -> torch.Tensor:
    return torch.arange(3, 3 + 2 * length).reshape(2, length) % 90 + 3


def _text() -> dict[str, Any]:
    return {"input_ids": _tokens(), "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2])}


INPUTS = {
    "text": _text,
    "causal": lambda: {**_text(), "use_cache": False},
    "pair": lambda: {**_text(), "decoder_input_ids": _tokens(5), "use_cache": False},
    "image": lambda: {"pixel_values": torch.randn(2, 3, 32, 32)},
    "wave": lambda: {"input_values": torch.randn(2, 2000)},
    "features": lambda: {"input_features": torch.randn(2, 30, 80)},
    "whisper": lambda: {
        "input_features": torch.randn(2, 80, 60),
        "decoder_input_ids": _tokens(5),
        "use_cache": False,
    },
    "image-text": lambda: {**_text(), "pixel_values": torch.randn(2, 3, 32, 32)},
}

ENC2 = f"{LAYERS} layers, attention and MLP"
ENC1 = f"{LAYERS} layers, attention and MLP in parallel"
DEC = f"{LAYERS} encoder layers of 2 and {LAYERS} decoder layers of 3"
_2, _DEC = 2 * LAYERS, 5 * LAYERS


def _bert(name: str, stem: str, **overrides: Any) -> Family:
    return Family(name, f"{stem}Config", f"{stem}Model", _2, ENC2, "text", overrides)


def _causal(name: str, stem: str, **overrides: Any) -> Family:
    return Family(name, f"{stem}Config", f"{stem}ForCausalLM", _2, ENC2, "causal", overrides)


def _vision(name: str, stem: str, **overrides: Any) -> Family:
    return Family(name, f"{stem}Config", f"{stem}Model", _2, ENC2, "image", overrides)


def _pair(name: str, stem: str, **overrides: Any) -> Family:
    return Family(name, f"{stem}Config", f"{stem}Model", _DEC, DEC, "pair", overrides)


_CONV = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4),
         "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
         "num_conv_pos_embedding_groups": 4, "apply_spec_augment": False}  # fmt: skip

FAMILIES = [
    Family(
        "albert",
        "AlbertConfig",
        "AlbertModel",
        2,
        "one layer of 2, shared",
        overrides={"embedding_size": 16},
    ),
    _bert("bert", "Bert"),
    Family("bert_generation", "BertGenerationConfig", "BertGenerationEncoder", _2, ENC2),
    _bert("big_bird", "BigBird", attention_type="original_full"),
    _bert("camembert", "Camembert"),
    Family(
        "canine",
        "CanineConfig",
        "CanineModel",
        _2 + 4,
        f"{LAYERS} layers of 2, and one on characters before and after",
    ),
    _bert("convbert", "ConvBert"),
    _bert("data2vec_text", "Data2VecText"),
    _bert("deberta", "Deberta"),
    _bert("deberta_v2", "DebertaV2"),
    _bert("distilbert", "DistilBert"),
    _bert("electra", "Electra"),
    _bert("ernie", "Ernie"),
    _bert("esm", "Esm"),
    _bert("eurobert", "EuroBert"),
    Family("flaubert", "FlaubertConfig", "FlaubertModel", _2, ENC2, "causal"),
    _bert("fnet", "FNet"),
    _bert("ibert", "IBert"),
    _bert("layoutlm", "LayoutLM"),
    _bert("longformer", "Longformer", attention_window=4),
    _bert("megatron_bert", "MegatronBert"),
    Family(
        "mobilebert",
        "MobileBertConfig",
        "MobileBertModel",
        5 * LAYERS,
        f"{LAYERS} layers of 5: attention and 4 MLPs",
        overrides={"embedding_size": 32, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    ),
    _bert("modernbert", "ModernBert"),
    _bert("mpnet", "MPNet"),
    Family(
        "mra",
        "MraConfig",
        "MraModel",
        LAYERS,
        f"{LAYERS} MLPs; without its CUDA kernel the attention returns zeros",
    ),
    _bert("nystromformer", "Nystromformer", num_landmarks=7, segment_means_seq_len=7),
    _bert("nomic_bert", "NomicBert"),
    _bert("rembert", "RemBert"),
    _bert("roberta", "Roberta"),
    _bert("roberta_prelayernorm", "RobertaPreLayerNorm"),
    _bert("roc_bert", "RoCBert", pronunciation_vocab_size=20, shape_vocab_size=20),
    _bert("roformer", "RoFormer"),
    _bert("squeezebert", "SqueezeBert"),
    _bert("splinter", "Splinter"),
    _bert("xlm_roberta", "XLMRoberta"),
    Family("xlm", "XLMConfig", "XLMModel", _2, ENC2, "causal"),
    _bert("yoso", "Yoso"),
    _bert("luke", "Luke", entity_vocab_size=20),
    _causal("apertus", "Apertus"),
    _causal("arcee", "Arcee"),
    _causal("biogpt", "BioGpt"),
    _causal("bloom", "Bloom"),
    Family(
        "codegen",
        "CodeGenConfig",
        "CodeGenForCausalLM",
        3,
        "3 layers, attention and MLP in one sum",
        "causal",
        {"rotary_dim": 4},
    ),
    Family(
        "cohere",
        "CohereConfig",
        "CohereForCausalLM",
        _2,
        ENC2,
        "causal",
    ),
    Family("ctrl", "CTRLConfig", "CTRLLMHeadModel", _2, ENC2, "causal", {"dff": 48}),
    _causal(
        "deepseek_v2",
        "DeepseekV2",
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        q_lora_rank=16,
        kv_lora_rank=16,
        num_key_value_heads=4,
        n_group=1,
        topk_group=1,
    ),
    _causal(
        "deepseek_v3",
        "DeepseekV3",
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        q_lora_rank=16,
        kv_lora_rank=16,
        num_key_value_heads=4,
        n_group=1,
        topk_group=1,
    ),
    Family(
        "falcon",
        "FalconConfig",
        "FalconForCausalLM",
        3,
        "3 layers, attention and MLP in one sum",
        "causal",
    ),
    Family(
        "falcon_mamba", "FalconMambaConfig", "FalconMambaForCausalLM", 3, "3 layers of 1", "causal"
    ),
    _causal("gemma", "Gemma"),
    _causal("gemma2", "Gemma2"),
    Family("gemma3", "Gemma3TextConfig", "Gemma3ForCausalLM", _2, ENC2, "causal"),
    _causal("glm", "Glm"),
    Family("gpt2", "GPT2Config", "GPT2LMHeadModel", _2, ENC2, "causal"),
    _causal("gpt_bigcode", "GPTBigCode"),
    Family(
        "gpt_neox",
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        3,
        "3 layers, attention and MLP in one sum",
        "causal",
    ),
    _causal("gpt_neox_japanese", "GPTNeoXJapanese"),
    _causal("gpt_oss", "GptOss"),
    Family(
        "gptj",
        "GPTJConfig",
        "GPTJForCausalLM",
        3,
        "3 layers, attention and MLP in one sum",
        "causal",
        {"rotary_dim": 4},
    ),
    _causal("granite", "Granite"),
    _causal("granitemoe", "GraniteMoe"),
    _causal("jamba", "Jamba"),
    _causal("jetmoe", "JetMoe"),
    _causal("lfm2", "Lfm2"),
    _causal("llama", "Llama"),
    Family("mamba", "MambaConfig", "MambaForCausalLM", 3, "3 layers of 1", "causal"),
    _causal("mistral", "Mistral"),
    _causal("mixtral", "Mixtral"),
    _causal("mpt", "Mpt"),
    _causal("nemotron", "Nemotron"),
    _causal("olmo", "Olmo"),
    _causal("olmo2", "Olmo2"),
    _causal("olmoe", "Olmoe"),
    _causal("opt", "OPT"),
    _causal("persimmon", "Persimmon"),
    Family(
        "phi", "PhiConfig", "PhiForCausalLM", 3, "3 layers, attention and MLP in one sum", "causal"
    ),
    _causal("phi3", "Phi3"),
    _causal("qwen2", "Qwen2"),
    _causal("qwen2_moe", "Qwen2Moe"),
    _causal("qwen3", "Qwen3"),
    _causal("qwen3_moe", "Qwen3Moe"),
    _causal("recurrent_gemma", "RecurrentGemma"),
    _causal("rwkv", "Rwkv"),
    _causal("smollm3", "SmolLM3"),
    _causal("stablelm", "StableLm"),
    _causal("starcoder2", "Starcoder2"),
    _causal("xglm", "XGLM"),
    _causal("xlstm", "xLSTM"),
    _pair("bart", "Bart"),
    _pair("blenderbot", "Blenderbot"),
    _pair("fsmt", "FSMT"),
    _pair("led", "LED", attention_window=4),
    _pair("longt5", "LongT5"),
    _pair("m2m_100", "M2M100"),
    _pair("marian", "Marian"),
    _pair("mbart", "MBart"),
    _pair("mt5", "MT5"),
    _pair("mvp", "Mvp"),
    _pair("nllb_moe", "NllbMoe"),
    _pair("pegasus", "Pegasus"),
    Family(
        "pegasus_x",
        "PegasusXConfig",
        "PegasusXModel",
        _DEC + 2 * (LAYERS - 1),
        f"{DEC}, and 2 more on the global tokens in all encoder layers but the last",
        "pair",
    ),
    _pair("plbart", "PLBart"),
    _pair("switch_transformers", "SwitchTransformers", router_jitter_noise=0.0),
    _pair("t5", "T5"),
    _pair("umt5", "UMT5"),
    _vision("beit", "Beit"),
    Family(
        "convnext",
        "ConvNextConfig",
        "ConvNextModel",
        5,
        "5 blocks",
        "image",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1], "patch_size": 2},
    ),
    _vision("data2vec_vision", "Data2VecVision"),
    _vision("deit", "DeiT"),
    _vision("dinov2", "Dinov2"),
    _vision("dinov3_vit", "DINOv3ViT"),
    Family("focalnet", "FocalNetConfig", "FocalNetModel", 24, "12 blocks of 2", "image"),
    _vision("ijepa", "IJepa"),
    Family(
        "mobilenet_v2",
        "MobileNetV2Config",
        "MobileNetV2Model",
        10,
        "10 blocks with stride 1",
        "image",
    ),
    Family(
        "mobilevit", "MobileViTConfig", "MobileViTModel", 20, "9 layers of 2 and 2 blocks", "image"
    ),
    Family(
        "poolformer",
        "PoolFormerConfig",
        "PoolFormerModel",
        10,
        "5 blocks of 2",
        "image",
        {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 2, 1]},
    ),
    Family(
        "pvt_v2",
        "PvtV2Config",
        "PvtV2Model",
        10,
        "5 blocks of 2",
        "image",
        {
            "num_attention_heads": [1, 2, 2, 2],
            "hidden_sizes": [8, 16, 16, 16],
            "depths": [1, 1, 2, 1],
            "patch_sizes": [2, 2, 2, 2],
        },
    ),
    Family(
        "regnet",
        "RegNetConfig",
        "RegNetModel",
        5,
        "5 blocks",
        "image",
        {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 2, 1], "groups_width": 8},
    ),
    Family(
        "resnet",
        "ResNetConfig",
        "ResNetModel",
        5,
        "5 blocks",
        "image",
        {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 2, 1], "embedding_size": 8},
    ),
    Family(
        "segformer",
        "SegformerConfig",
        "SegformerModel",
        10,
        "5 blocks of 2",
        "image",
        {
            "num_attention_heads": [1, 2, 2, 2],
            "hidden_sizes": [8, 16, 16, 16],
            "depths": [1, 1, 2, 1],
        },
    ),
    Family(
        "siglip_vision",
        "SiglipVisionConfig",
        "SiglipVisionModel",
        7,
        "3 layers of 2 and the pooling head",
        "image",
    ),
    _vision("clip_vision", "CLIPVision"),
    Family("swiftformer", "SwiftFormerConfig", "SwiftFormerModel", 24, "by hand", "image"),
    Family(
        "swin",
        "SwinConfig",
        "SwinModel",
        8,
        "4 layers of 2",
        "image",
        {"depths": [2, 2], "num_heads": [2, 4], "embed_dim": 16, "window_size": 2, "patch_size": 4},
    ),
    Family(
        "swinv2",
        "Swinv2Config",
        "Swinv2Model",
        8,
        "4 layers of 2",
        "image",
        {"depths": [2, 2], "num_heads": [2, 4], "embed_dim": 16, "window_size": 2, "patch_size": 4},
    ),
    _vision("vit", "ViT"),
    _vision("vit_mae", "ViTMAE"),
    _vision("vit_msn", "ViTMSN"),
    _vision("yolos", "Yolos", image_size=(32, 32)),
    Family(
        "audio_spectrogram_transformer",
        "ASTConfig",
        "ASTModel",
        _2,
        ENC2,
        "ast",
        {"max_length": 64, "num_mel_bins": 32},
    ),
    Family("data2vec_audio", "Data2VecAudioConfig", "Data2VecAudioModel", _2, ENC2, "wave", _CONV),
    Family("hubert", "HubertConfig", "HubertModel", _2, ENC2, "wave", _CONV),
    Family("sew", "SEWConfig", "SEWModel", _2, ENC2, "wave", _CONV),
    Family("unispeech", "UniSpeechConfig", "UniSpeechModel", _2, ENC2, "wave", _CONV),
    Family("wav2vec2", "Wav2Vec2Config", "Wav2Vec2Model", _2, ENC2, "wave", _CONV),
    Family(
        "wav2vec2_bert",
        "Wav2Vec2BertConfig",
        "Wav2Vec2BertModel",
        12,
        "3 layers of 4",
        "w2vbert",
        {"apply_spec_augment": False, "layerdrop": 0.0},
    ),
    Family(
        "wav2vec2_conformer",
        "Wav2Vec2ConformerConfig",
        "Wav2Vec2ConformerModel",
        12,
        ENC2,
        "wave",
        _CONV,
    ),
    Family(
        "wavlm",
        "WavLMConfig",
        "WavLMModel",
        5,
        "6 less the first attention, which makes the position bias",
        "wave",
        _CONV,
    ),
    Family(
        "whisper",
        "WhisperConfig",
        "WhisperModel",
        _DEC,
        DEC,
        "whisper",
        {"max_source_positions": 30, "max_target_positions": 20},
    ),
    Family(
        "speech_to_text",
        "Speech2TextConfig",
        "Speech2TextModel",
        _DEC,
        DEC,
        "s2t",
        {"max_source_positions": 60, "max_target_positions": 20},
    ),
    Family("vilt", "ViltConfig", "ViltModel", _2, ENC2, "image-text"),
    Family("blip_text", "BlipTextConfig", "BlipTextModel", _2, ENC2, "text"),
    Family("clip_text", "CLIPTextConfig", "CLIPTextModel", _2, ENC2, "text"),
    Family("visual_bert", "VisualBertConfig", "VisualBertModel", _2, ENC2, "text"),
    Family("videomae", "VideoMAEConfig", "VideoMAEModel", _2, ENC2, "video", {"num_frames": 4}),
    Family(
        "timesformer", "TimesformerConfig", "TimesformerModel", 9, ENC2, "video", {"num_frames": 4}
    ),
    Family(
        "vivit",
        "VivitConfig",
        "VivitModel",
        _2,
        ENC2,
        "video",
        {"num_frames": 4, "tubelet_size": [2, 8, 8]},
    ),
    Family("trocr", "TrOCRConfig", "TrOCRForCausalLM", _2, ENC2, "causal"),
    Family(
        "decision_transformer",
        "DecisionTransformerConfig",
        "DecisionTransformerGPT2Model",
        _2,
        ENC2,
        "causal",
    ),
]
INPUTS["ast"] = lambda: {"input_values": torch.randn(2, 64, 32)}
INPUTS["w2vbert"] = lambda: {"input_features": torch.randn(2, 30, 160)}
INPUTS["s2t"] = lambda: {
    "input_features": torch.randn(2, 40, 80),
    "decoder_input_ids": _tokens(5),
    "use_cache": False,
}
INPUTS["video"] = lambda: {"pixel_values": torch.randn(2, 4, 3, 32, 32)}
