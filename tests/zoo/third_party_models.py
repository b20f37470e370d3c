"""Small random models of packages that nothing here was written for, with inputs for them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Model:
    """A model of a package.

    Attributes:
        package: its name in the registry.
        name: of the model.
        build: makes it.
        inputs: makes what it is called with.
        refused: how many of its residual sums cannot be dropped, and words of the reason that
            ``apply`` must give.
        counted: how many it has by reading the source, where data flow tells too little, and how.
    """

    package: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    refused: tuple[int, str] = (0, "")
    counted: tuple[int, str] | None = None


def _made(path: str, *args: Any, **kwargs: Any) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)(*args, **kwargs)


def _of(path: str, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    return partial(_made, path, *args, **kwargs)


def _images(size: int = 32, channels: int = 3) -> Callable[[], Tensor]:
    return partial(torch.randn, 2, channels, size, size)


def _floats(*shape: int) -> Callable[[], Tensor]:
    return partial(torch.randn, *shape)


def _tokens(length: int = 16) -> Tensor:
    return torch.arange(3, 3 + 2 * length).reshape(2, length) % 90 + 3


_VIT = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 3, "heads": 4}
_VIT |= {"mlp_dim": 48, "dim_head": 8}


_Refused = tuple[int, str]
_NONE: _Refused = (0, "")
_GROUPED = "it is made of grouped convolutions alone: a positional encoding"
_ITSELF = "the model drops it by itself"
_REVERSIBLE = "its block is called in a custom autograd.Function"  # computes the inverse


def _vit(name: str, path: str, size: int = 32, refused: _Refused = _NONE, **kwargs: Any) -> Model:
    build = _of(f"vit_pytorch.{path}", **kwargs)
    return Model("vit-pytorch", name, build, _images(size), refused)


VIT_PYTORCH = [
    _vit("ViT", "vit.ViT", **_VIT),
    _vit("SimpleViT", "simple_vit.SimpleViT", **_VIT),
    _vit("DeepViT", "deepvit.DeepViT", **_VIT),
    _vit("CaiT", "cait.CaiT", **_VIT, cls_depth=2),
    _vit("XCiT", "xcit.XCiT", **_VIT, cls_depth=2),
    _vit("ParallelViT", "parallel_vit.ViT", **_VIT),
    _vit("nViT", "normalized_vit.nViT", **_VIT),
    _vit("SimpleViT, values", "simple_vit_with_value_residual.SimpleViT", **_VIT),
    _vit("ATS", "ats_vit.ViT", **_VIT, max_tokens_per_depth=(16, 8, 4)),
    _vit(
        "NesT",
        "nest.NesT",
        image_size=32,
        patch_size=4,
        num_classes=5,
        dim=16,
        heads=2,
        num_hierarchies=2,
        block_repeats=(1, 1),
        dim_head=8,
    ),
    _vit(
        "LookViT",
        "look_vit.LookViT",
        dim=32,
        image_size=32,
        num_classes=5,
        depth=1,
        patch_size=16,
        heads=2,
        dim_head=8,
        highres_patch_size=8,
        cross_attn_heads=2,
        cross_attn_dim_head=8,
    ),
    _vit(
        "CvT",
        "cvt.CvT",
        num_classes=5,
        s1_emb_dim=16,
        s2_emb_dim=16,
        s3_emb_dim=32,
        s2_heads=1,
        s3_heads=2,
        s2_depth=1,
        s3_depth=2,
    ),
    _vit(
        "MaxViT",
        "max_vit.MaxViT",
        56,
        num_classes=5,
        dim=16,
        depth=(1, 1),
        dim_head=8,
        dim_conv_stem=16,
        window_size=7,
    ),
    _vit(
        "MobileViT",
        "mobile_vit.MobileViT",
        64,
        image_size=(64, 64),
        dims=[16, 16, 16],
        channels=[8, 8, 16, 16, 16, 16, 16, 16, 16, 16, 32],
        num_classes=5,
        depths=(1, 1, 1),
    ),
    _vit(
        "CrossFormer",
        "crossformer.CrossFormer",
        224,
        dim=(64, 64, 64, 64),
        depth=(1, 1, 1, 1),
        global_window_size=(8, 4, 2, 1),
        local_window_size=7,
        num_classes=5,
    ),
    _vit(
        "LeViT",
        "levit.LeViT",
        64,
        image_size=64,
        num_classes=5,
        dim=(16, 16, 32),
        depth=1,
        heads=(2, 2, 2),
        mlp_mult=2,
        stages=3,
        dim_key=8,
        dim_value=8,
    ),
    _vit(
        "SepViT",
        "sep_vit.SepViT",
        56,
        num_classes=5,
        dim=16,
        depth=(1, 1),
        heads=(1, 2),
        window_size=7,
        dim_head=8,
        refused=(2, _GROUPED),
    ),
    _vit(
        "ScalableViT",
        "scalable_vit.ScalableViT",
        64,
        num_classes=5,
        dim=16,
        depth=(1, 1),
        heads=(1, 2),
        reduction_factor=(2, 1),
        window_size=(4, None),
        iwsa_dim_key=8,
        iwsa_dim_value=8,
        ssa_dim_key=8,
        ssa_dim_value=8,
        refused=(2, _GROUPED),
    ),
    Model(
        "vit-pytorch",
        "ViT 3D",
        _of(
            "vit_pytorch.vit_3d.ViT",
            image_size=32,
            image_patch_size=8,
            frames=4,
            frame_patch_size=2,
            num_classes=5,
            dim=32,
            depth=2,
            heads=4,
            mlp_dim=48,
        ),
        _floats(2, 3, 4, 32, 32),
    ),
    Model(
        "vit-pytorch",
        "ViViT",
        _of(
            "vit_pytorch.vivit.ViViT",
            image_size=32,
            image_patch_size=8,
            frames=4,
            frame_patch_size=2,
            num_classes=5,
            dim=32,
            spatial_depth=2,
            temporal_depth=2,
            heads=4,
            mlp_dim=48,
        ),
        _floats(2, 3, 4, 32, 32),
    ),
]


def _time() -> Tensor:
    return torch.tensor([3, 7])


def _diffusion(channels: int = 4, size: int = 16) -> dict[str, Any]:
    return {"sample": torch.randn(2, channels, size, size), "timestep": _time()}


def _dit() -> dict[str, Any]:
    inputs = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": _time()}
    return inputs | {"class_labels": torch.tensor([1, 2])}


def _prompted(size: int = 8, width: int = 32) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, size, size),
        "timestep": _time(),
        "encoder_hidden_states": torch.randn(2, 5, width),
    }


def _flux() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 16, 4),
        "timestep": torch.tensor([0.3, 0.7]),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 32),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }


_SMALL_DIT = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4}
_SMALL_DIT |= {"num_layers": 2, "sample_size": 8, "patch_size": 2}
_UNET = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "layers_per_block": 1}
_UNET |= {"block_out_channels": (16, 32), "norm_num_groups": 8}


def _diffusers(
    name: str, inputs: Callable[[], Any], refused: tuple[int, str] = (0, ""), **kwargs: Any
) -> Model:
    return Model("diffusers", name, _of(f"diffusers.{name}", **kwargs), inputs, refused)


DIFFUSERS = [
    _diffusers(
        "UNet2DModel",
        _diffusion,
        **_UNET,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ),
    _diffusers(
        "UNet2DConditionModel",
        lambda: _diffusion() | {"encoder_hidden_states": torch.randn(2, 5, 32)},
        **_UNET,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
    ),
    _diffusers(
        "DiTTransformer2DModel", _dit, **_SMALL_DIT, num_embeds_ada_norm=10, norm_num_groups=8
    ),
    _diffusers(
        "PixArtTransformer2DModel",
        lambda: _prompted() | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        **_SMALL_DIT,
        cross_attention_dim=32,
        caption_channels=32,
        norm_num_groups=8,
        use_additional_conditions=False,
    ),
    _diffusers(
        "SD3Transformer2DModel",
        lambda: _prompted() | {"pooled_projections": torch.randn(2, 32)},
        **_SMALL_DIT,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
    ),
    _diffusers(
        "FluxTransformer2DModel",
        _flux,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=False,
    ),
    _diffusers(
        "AuraFlowTransformer2DModel",
        _prompted,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
    ),
    _diffusers(
        "AutoencoderKL",
        _images(16),
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ),
    _diffusers(
        "AutoencoderTiny",
        _images(16),
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
    ),
    _diffusers(
        "WanTransformer3DModel",
        lambda: {
            "hidden_states": torch.randn(2, 4, 2, 8, 8),
            "timestep": _time(),
            "encoder_hidden_states": torch.randn(2, 5, 32),
        },
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=32,
    ),
]


def _lm(name: str, layers: str, **kwargs: Any) -> Model:
    def build() -> nn.Module:
        x = import_module("x_transformers")
        own = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8} | kwargs
        return x.TransformerWrapper(
            num_tokens=99, max_seq_len=32, attn_layers=getattr(x, layers)(**own)
        )

    return Model("x-transformers", name, build, _tokens)


X_TRANSFORMERS = [
    _lm("decoder", "Decoder"),
    _lm(
        "decoder, rotary, GLU, RMSNorm",
        "Decoder",
        rotary_pos_emb=True,
        ff_glu=True,
        use_rmsnorm=True,
    ),
    _lm("decoder, alibi", "Decoder", alibi_pos_bias=True),
    _lm("decoder, gated residual", "Decoder", gate_residual=True),
    _lm("decoder, sandwich norm", "Decoder", sandwich_norm=True),
    _lm("encoder", "Encoder"),
    _lm("encoder, T5 bias", "Encoder", rel_pos_bias=True),
    Model(
        "x-transformers",
        "ViTransformerWrapper",
        lambda: _made(
            "x_transformers.ViTransformerWrapper",
            image_size=32,
            patch_size=8,
            num_classes=5,
            attn_layers=_made("x_transformers.Encoder", dim=32, depth=2, heads=4, attn_dim_head=8),
        ),
        _images(),
    ),
]


def _smp(name: str, encoder: str, refused: _Refused = _NONE, **kwargs: Any) -> Model:
    path = f"segmentation_models_pytorch.{name}"
    build = _of(path, encoder_name=encoder, encoder_weights=None, **kwargs)
    told = "".join(f", {x}" for x in kwargs.values() if isinstance(x, str))
    return Model(
        "segmentation-models-pytorch", f"{name}, {encoder}{told}", build, _images(64), refused
    )


def _counted(model: Model, count: int, why: str) -> Model:
    return replace(model, counted=(count, f"by the source: {why}"))


SMP = [
    _smp("Unet", "resnet18"),
    _smp("Unet", "resnet18", decoder_attention_type="scse"),
    _smp("Unet", "efficientnet-b0", refused=(9, _ITSELF)),
    _counted(_smp("FPN", "mobilenet_v2"), 10, "its pyramid joins features of two depths"),
    _smp("DeepLabV3Plus", "resnet18"),
    _smp("Segformer", "mit_b0"),
    _smp("Unet", "se_resnet50"),
    _counted(_smp("Linknet", "mobilenet_v2"), 11, "ten, and the deepest sum of the decoder"),
]


def _graph() -> dict[str, Any]:
    return {
        "x": torch.randn(6, 16),
        "edge_index": torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 0, 4, 5, 3]]),
    }


class _GPS(nn.Module):
    """Two layers of torch_geometric's GPSConv, as its example has them."""

    def __init__(self) -> None:
        super().__init__()
        g = import_module("torch_geometric.nn")
        mlps = [nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(2)]
        self.convs = nn.ModuleList(g.GPSConv(16, g.GINConv(mlp), heads=2) for mlp in mlps)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x, edge_index)
        return x


class _DeepGCN(nn.Module):
    """torch_geometric's DeepGCNLayer, as its example has them."""

    def __init__(self) -> None:
        super().__init__()
        g = import_module("torch_geometric.nn")
        self.layers = nn.ModuleList(
            g.DeepGCNLayer(
                g.GENConv(16, 16, num_layers=2), nn.LayerNorm(16), nn.ReLU(), block="res+"
            )
            for _ in range(3)
        )

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, edge_index)
        return x


def _two_graphs() -> dict[str, Any]:
    return _graph() | {"batch": torch.tensor([0, 0, 0, 1, 1, 1])}


GRAPHS = [
    Model("torch-geometric", "GPS", _GPS, _graph),
    Model("torch-geometric", "DeepGCN", _DeepGCN, _graph),
    Model("torch-geometric", "GCN", _of("torch_geometric.nn.GCN", 16, 16, 3, 4), _graph),
    Model(
        "torch-geometric",
        "Polynormer",
        _of("torch_geometric.nn.Polynormer", 16, 16, 4, local_layers=2, global_layers=1, heads=2),
        _two_graphs,
    ),
    Model(
        "torch-geometric",
        "SGFormer",
        _of("torch_geometric.nn.SGFormer", 16, 16, 4, trans_num_layers=2, gnn_num_layers=2),
        _two_graphs,
    ),
    Model(
        "torch-geometric",
        "AttentiveFP",
        _of("torch_geometric.nn.AttentiveFP", 16, 16, 4, edge_dim=4, num_layers=2, num_timesteps=2),
        lambda: _two_graphs() | {"edge_attr": torch.randn(6, 4)},
    ),
    Model(
        "egnn-pytorch",
        "EGNN_Network",
        _of("egnn_pytorch.EGNN_Network", depth=2, dim=16, num_tokens=21),
        lambda: (_tokens(6) % 20, torch.randn(2, 6, 3)),
    ),
]

_IMAGES_TOO = [
    Model(
        "denoising-diffusion-pytorch",
        "Unet",
        _of("denoising_diffusion_pytorch.Unet", dim=16, dim_mults=(1, 2), flash_attn=False),
        lambda: (torch.randn(2, 3, 16, 16), _time()),
    ),
    Model(
        "denoising-diffusion-pytorch",
        "Unet1D",
        _of("denoising_diffusion_pytorch.Unet1D", dim=16, dim_mults=(1, 2), channels=3),
        lambda: (torch.randn(2, 3, 16), _time()),
    ),
    Model(
        "denoising-diffusion-pytorch",
        "KarrasUnet",
        _of(
            "denoising_diffusion_pytorch.KarrasUnet",
            image_size=16,
            dim=16,
            dim_max=32,
            num_downsamples=1,
            num_blocks_per_stage=1,
            attn_res=(8,),
            attn_dim_head=8,
        ),
        lambda: (torch.randn(2, 4, 16, 16), _time().float()),
    ),
    Model(
        "denoising-diffusion-pytorch",
        "UViT",
        _of(
            "denoising_diffusion_pytorch.simple_diffusion.UViT",
            dim=16,
            dim_mults=(1, 2),
            vit_depth=2,
            attn_dim_head=8,
        ),
        lambda: (torch.randn(2, 3, 16, 16), torch.rand(2)),
    ),
    Model(
        "monai",
        "UNet",
        _of("monai.networks.nets.UNet", 2, 1, 2, (8, 16), (2,), num_res_units=2),
        _images(16, 1),
    ),
    Model(
        "monai",
        "SegResNet",
        _of("monai.networks.nets.SegResNet", 2, 8, blocks_down=(1, 2), blocks_up=(1,)),
        _images(16, 1),
    ),
    Model(
        "monai",
        "SwinUNETR",
        _of(
            "monai.networks.nets.SwinUNETR",
            1,
            2,
            feature_size=12,
            spatial_dims=2,
            num_heads=(1, 1, 2, 2),
        ),
        _images(64, 1),
    ),
    Model(
        "monai",
        "UNETR",
        _of(
            "monai.networks.nets.UNETR",
            1,
            2,
            32,
            feature_size=8,
            hidden_size=24,
            mlp_dim=48,
            num_heads=2,
            spatial_dims=2,
        ),
        _images(32, 1),
    ),
    Model(
        "monai",
        "ViT",
        _of(
            "monai.networks.nets.ViT",
            1,
            32,
            8,
            hidden_size=24,
            mlp_dim=48,
            num_layers=2,
            num_heads=2,
            spatial_dims=2,
        ),
        _images(32, 1),
    ),
    Model(
        "monai",
        "resnet10",
        _of("monai.networks.nets.resnet10", spatial_dims=2, n_input_channels=1),
        _images(32, 1),
    ),
    Model(
        "monai",
        "DiffusionModelUNet",
        _of(
            "monai.networks.nets.DiffusionModelUNet",
            2,
            1,
            1,
            num_res_blocks=1,
            channels=(8, 16),
            attention_levels=(False, True),
            norm_num_groups=4,
            num_head_channels=8,
        ),
        lambda: (torch.randn(2, 1, 16, 16), _time()),
    ),
    Model(
        "monai",
        "Restormer",
        _of(
            "monai.networks.nets.restormer.Restormer",
            2,
            1,
            1,
            dim=8,
            num_blocks=(1, 1),
            heads=(1, 2),
            num_refinement_blocks=1,
        ),
        _images(16, 1),
    ),
    Model(
        "monai",
        "MedNeXt",
        _of(
            "monai.networks.nets.MedNeXt",
            2,
            8,
            1,
            2,
            blocks_down=(1, 1),
            blocks_bottleneck=1,
            blocks_up=(1, 1),
        ),
        _images(32, 1),
    ),
    Model(
        "kornia",
        "EfficientViT b0",
        _of("kornia.models.efficient_vit.backbone.efficientvit_backbone_b0"),
        _images(64),
    ),
    Model(
        "kornia",
        "RRDBNet",
        _of("kornia.models.rrdbnet.RRDBNet", 3, 3, num_block=1, num_feat=16, num_grow_ch=8),
        _images(16),
    ),
    Model(
        "pytorchvideo",
        "X3D",
        _of(
            "pytorchvideo.models.x3d.create_x3d",
            input_clip_length=4,
            input_crop_size=32,
            model_num_class=5,
        ),
        _floats(2, 3, 4, 32, 32),
    ),
    Model(
        "pytorchvideo",
        "MViT",
        _of(
            "pytorchvideo.models.create_multiscale_vision_transformers",
            spatial_size=32,
            temporal_size=4,
            depth=3,
            patch_embed_dim=16,
            num_heads=1,
            embed_dim_mul=[[1, 2.0]],
            pool_q_stride_size=[[1, 1, 2, 2]],
            droppath_rate_block=0.1,
            head_num_classes=5,
        ),
        _floats(2, 3, 4, 32, 32),
        counted=(6, "by the source: three blocks of two"),
    ),
    Model(
        "pytorchvideo",
        "R(2+1)D",
        _of(
            "pytorchvideo.models.r2plus1d.create_r2plus1d",
            model_depth=50,
            model_num_class=5,
            head_pool_kernel_size=(1, 1, 1),
        ),
        _floats(2, 3, 8, 32, 32),
    ),
    Model(
        "efficientnet-pytorch",
        "EfficientNet b0",
        lambda: import_module("efficientnet_pytorch").EfficientNet.from_name("efficientnet-b0"),
        _images(64),
        refused=(9, _ITSELF),
    ),
    Model(
        "pretrainedmodels",
        "se_resnext50_32x4d",
        _of("pretrainedmodels.se_resnext50_32x4d", pretrained=None),
        _images(224),
    ),
    Model(
        "geffnet",
        "efficientnet_b0",
        _of("geffnet.efficientnet_b0", drop_connect_rate=0.2),
        _images(64),
        refused=(9, _ITSELF),
    ),
    Model("geffnet", "mobilenetv3_large_100", _of("geffnet.mobilenetv3_large_100"), _images(64)),
    Model(
        "pytorchcv",
        "preresnet18",
        lambda: _made("pytorchcv.model_provider.get_model", "preresnet18"),
        _images(224),
    ),
    Model(
        "pytorchcv",
        "shufflenetv2_wd2",
        lambda: _made("pytorchcv.model_provider.get_model", "shufflenetv2_wd2"),
        _images(224),
    ),
    Model("resnest", "resnest50", _of("resnest.torch.resnest50"), _images(64)),
    Model(
        "facenet-pytorch",
        "InceptionResnetV1",
        _of("facenet_pytorch.InceptionResnetV1", classify=True, num_classes=5),
        _images(96),
    ),
    Model(
        "segment-anything",
        "ImageEncoderViT",
        _of(
            "segment_anything.modeling.ImageEncoderViT",
            img_size=64,
            patch_size=8,
            embed_dim=32,
            depth=3,
            num_heads=2,
            out_chans=16,
            use_rel_pos=True,
            window_size=4,
            global_attn_indexes=(2,),
        ),
        _images(64),
    ),
    Model(
        "torchsr",
        "edsr_baseline",
        _of("torchsr.models.edsr_baseline", 2, pretrained=False),
        _images(16),
    ),
    Model("torchsr", "rcan", _of("torchsr.models.rcan.RCAN", 2, 3, 16, 4, 2), _images(16)),
    Model(
        "torchsr", "ninasr_b0", _of("torchsr.models.ninasr_b0", 2, pretrained=False), _images(16)
    ),
    Model(
        "dynamic-network-architectures",
        "ResidualEncoderUNet",
        _of(
            "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
            1,
            3,
            (8, 16, 16),
            nn.Conv2d,
            3,
            (1, 2, 2),
            (1, 2, 2),
            2,
            (1, 1),
            norm_op=nn.InstanceNorm2d,
            norm_op_kwargs={},
            nonlin=nn.ReLU,
            nonlin_kwargs={},
        ),
        _images(16, 1),
    ),
    Model(
        "bottleneck-transformer-pytorch",
        "BottleStack",
        _of(
            "bottleneck_transformer_pytorch.BottleStack",
            dim=16,
            fmap_size=8,
            dim_out=32,
            heads=2,
            dim_head=8,
        ),
        _images(8, 16),
    ),
    Model(
        "axial-attention",
        "AxialImageTransformer",
        _of("axial_attention.AxialImageTransformer", dim=16, depth=2, heads=2, reversible=False),
        _images(8, 16),
    ),
    Model(
        "axial-attention",
        "reversible",
        _of("axial_attention.AxialImageTransformer", dim=16, depth=2, heads=2, reversible=True),
        _images(8, 16),
        refused=(8, _REVERSIBLE),
    ),
    Model(
        "mlp-mixer-pytorch",
        "MLPMixer",
        _of(
            "mlp_mixer_pytorch.MLPMixer",
            image_size=32,
            channels=3,
            patch_size=8,
            dim=32,
            depth=2,
            num_classes=5,
        ),
        _images(),
    ),
    Model(
        "g-mlp-pytorch",
        "gMLPVision",
        _of(
            "g_mlp_pytorch.gMLPVision", image_size=32, patch_size=8, num_classes=5, dim=32, depth=2
        ),
        _images(),
    ),
    Model(
        "timesformer-pytorch",
        "TimeSformer",
        _of(
            "timesformer_pytorch.TimeSformer",
            dim=32,
            num_frames=4,
            num_classes=5,
            image_size=32,
            patch_size=8,
            depth=2,
            heads=2,
            dim_head=16,
        ),
        _floats(2, 4, 3, 32, 32),
    ),
    Model(
        "perceiver-pytorch",
        "Perceiver",
        _of(
            "perceiver_pytorch.Perceiver",
            num_freq_bands=2,
            depth=2,
            max_freq=10.0,
            num_latents=8,
            latent_dim=16,
            cross_dim_head=8,
            latent_dim_head=8,
            latent_heads=2,
            num_classes=5,
        ),
        _floats(2, 8, 8, 3),
    ),
    Model(
        "perceiver-pytorch",
        "PerceiverIO",
        _of(
            "perceiver_pytorch.perceiver_io.PerceiverIO",
            depth=2,
            dim=16,
            queries_dim=16,
            num_latents=8,
            latent_dim=16,
            cross_dim_head=8,
            latent_dim_head=8,
        ),
        lambda: {"data": torch.randn(2, 10, 16), "queries": torch.randn(2, 4, 16)},
    ),
    Model(
        "coca-pytorch",
        "CoCa",
        lambda: _made(
            "coca_pytorch.coca_pytorch.CoCa",
            dim=32,
            num_tokens=99,
            unimodal_depth=2,
            multimodal_depth=2,
            image_dim=16,
            num_img_queries=4,
            dim_head=8,
            heads=2,
        ),
        lambda: {"text": _tokens(), "image_tokens": torch.randn(2, 6, 16)},
    ),
    Model(
        "open-clip-torch",
        "text and vision",
        lambda: _made(
            "open_clip.model.CLIP",
            16,
            {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
            {"context_length": 16, "vocab_size": 99, "width": 32, "heads": 2, "layers": 2},
        ),
        lambda: (torch.randn(2, 3, 32, 32), _tokens()),
    ),
]


def _esm1() -> nn.Module:
    from argparse import Namespace

    esm = import_module("esm")
    args = Namespace(
        arch="roberta_large",
        layers=2,
        embed_dim=32,
        ffn_embed_dim=48,
        attention_heads=2,
        max_positions=64,
        emb_layer_norm_before=True,
        token_dropout=False,
        final_bias=True,
    )
    alphabet = esm.data.Alphabet.from_architecture("roberta_large")
    return esm.model.esm1.ProteinBertModel(args, alphabet)


def _torchscale(**kwargs: Any) -> nn.Module:
    config = _made(
        "torchscale.architecture.config.EncoderConfig",
        vocab_size=99,
        encoder_embed_dim=32,
        encoder_attention_heads=2,
        encoder_ffn_embed_dim=48,
        encoder_layers=2,
        **kwargs,
    )
    embed = nn.Embedding(99, 32)
    return _made("torchscale.architecture.encoder.Encoder", config, embed_tokens=embed)


_SEQUENCES = [
    Model("fair-esm", "ESM2", lambda: _made("esm.ESM2", 2, 32, 2), lambda: _tokens() % 20 + 4),
    Model("fair-esm", "ESM-1b", _esm1, lambda: _tokens() % 20 + 4),
    Model(
        "tab-transformer-pytorch",
        "FTTransformer",
        _of(
            "tab_transformer_pytorch.FTTransformer",
            categories=(5, 6),
            num_continuous=3,
            dim=16,
            depth=2,
            heads=2,
            dim_head=8,
        ),
        lambda: (torch.tensor([[1, 2], [3, 4]]), torch.randn(2, 3)),
    ),
    Model(
        "rtdl-revisiting-models",
        "ResNet",
        _of(
            "rtdl_revisiting_models.ResNet",
            d_in=6,
            d_out=2,
            n_blocks=2,
            d_block=16,
            d_hidden_multiplier=2.0,
            dropout1=0.1,
            dropout2=0.1,
        ),
        _floats(4, 6),
    ),
    Model(
        "rtdl-revisiting-models",
        "FTTransformer",
        _of(
            "rtdl_revisiting_models.FTTransformer",
            n_cont_features=3,
            cat_cardinalities=[5, 6],
            d_out=2,
            n_blocks=2,
            d_block=16,
            attention_n_heads=2,
            attention_dropout=0.1,
            ffn_d_hidden_multiplier=2.0,
            ffn_dropout=0.1,
            residual_dropout=0.0,
        ),
        lambda: (torch.randn(2, 3), torch.tensor([[1, 2], [3, 4]])),
    ),
    Model(
        "pytorch-tabnet",
        "TabNet",
        _of("pytorch_tabnet.tab_network.TabNet", 8, 2, group_attention_matrix=torch.eye(8)),
        _floats(4, 8),
    ),
    Model(
        "performer-pytorch",
        "PerformerLM",
        _of(
            "performer_pytorch.PerformerLM",
            num_tokens=99,
            max_seq_len=16,
            dim=32,
            depth=2,
            heads=2,
            dim_head=16,
        ),
        _tokens,
    ),
    Model(
        "performer-pytorch",
        "reversible",
        _of(
            "performer_pytorch.PerformerLM",
            num_tokens=99,
            max_seq_len=16,
            dim=32,
            depth=2,
            heads=2,
            dim_head=16,
            reversible=True,
        ),
        _tokens,
        refused=(4, _REVERSIBLE),
    ),
    Model(
        "reformer-pytorch",
        "ReformerLM",
        _of(
            "reformer_pytorch.ReformerLM",
            num_tokens=99,
            dim=32,
            depth=2,
            max_seq_len=16,
            heads=2,
            bucket_size=4,
            n_hashes=2,
            ff_chunks=1,
        ),
        _tokens,
        refused=(4, _REVERSIBLE),
    ),
    Model(
        "linformer",
        "LinformerLM",
        _of("linformer.LinformerLM", num_tokens=99, dim=32, seq_len=16, depth=2, k=8, heads=2),
        _tokens,
    ),
    Model(
        "local-attention",
        "LocalTransformer",
        _of(
            "local_attention.LocalTransformer",
            num_tokens=99,
            max_seq_len=16,
            dim=32,
            depth=2,
            local_attn_window_size=4,
            heads=2,
            dim_head=16,
        ),
        _tokens,
    ),
    Model(
        "linear-attention-transformer",
        "LM",
        _of(
            "linear_attention_transformer.LinearAttentionTransformerLM",
            num_tokens=99,
            dim=32,
            depth=2,
            max_seq_len=16,
            heads=2,
            dim_head=16,
        ),
        _tokens,
    ),
    Model(
        "nystrom-attention",
        "Nystromformer",
        _of(
            "nystrom_attention.Nystromformer",
            dim=32,
            depth=2,
            heads=2,
            dim_head=16,
            num_landmarks=4,
        ),
        _floats(2, 16, 32),
    ),
    Model(
        "simple-hierarchical-transformer",
        "HierarchicalTransformer",
        _of(
            "simple_hierarchical_transformer.HierarchicalTransformer",
            num_tokens=99,
            dim=32,
            depth=2,
            seq_len=16,
            heads=2,
            dim_head=16,
            hierarchies=(1, 2),
            window_sizes=(8, None),
        ),
        _tokens,
    ),
    Model(
        "g-mlp-pytorch",
        "gMLP",
        _of("g_mlp_pytorch.gMLP", num_tokens=99, dim=32, depth=2, seq_len=16),
        _tokens,
    ),
    Model(
        "conformer",
        "Conformer",
        _of("conformer.Conformer", dim=32, depth=2, dim_head=16, heads=2, conv_kernel_size=5),
        _floats(2, 16, 32),
    ),
    Model("torchscale", "BERT", _torchscale, lambda: {"src_tokens": _tokens()}),
    Model(
        "torchscale",
        "deepnorm, T5 bias",
        lambda: _torchscale(deepnorm=True, subln=False, rel_pos_buckets=8, max_rel_pos=16),
        lambda: {"src_tokens": _tokens()},
    ),
    Model(
        "snac",
        "SNAC",
        _of(
            "snac.SNAC",
            16000,
            8,
            [2, 2],
            decoder_dim=32,
            decoder_rates=[2, 2],
            attn_window_size=None,
            codebook_size=16,
            vq_strides=[2, 1],
        ),
        _floats(2, 1, 64),
        counted=(14, "by the source: 14 units and noise blocks; a quantizer is no branch"),
    ),
    Model(
        "demucs",
        "HDemucs",
        _of(
            "demucs.hdemucs.HDemucs",
            ["a", "b"],
            audio_channels=1,
            channels=4,
            depth=4,
            nfft=256,
            dconv_lstm=3,
            dconv_attn=3,
        ),
        _floats(2, 1, 2048),
    ),
]

MODELS = VIT_PYTORCH + DIFFUSERS + X_TRANSFORMERS + SMP + GRAPHS + _IMAGES_TOO + _SEQUENCES
