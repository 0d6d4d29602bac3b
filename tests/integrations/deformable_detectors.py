"""Tiny random models of every family of transformers with deformable attention, and inputs for them."""

import copy
from collections.abc import Callable

import torch
import transformers
from torch import nn

SIDE = 64
DIM = 32


def resnet(*channels: int):
    """A backbone with maps of a stride of 8, 16 and 32, in these numbers of channels."""
    names = [f"stage{i}" for i in range(2, 2 + len(channels))]
    sizes = {"embedding_size": 8, "hidden_sizes": [8, *channels], "depths": [1] * (1 + len(channels))}
    return transformers.RTDetrResNetConfig(layer_type="basic", out_features=names, **sizes)


def hgnet(stages: tuple[int, ...]):
    """The backbone of the newer RT-DETR models, in which stage i has 8 * i channels."""
    out = [8, 16, 24, 32]
    return transformers.HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 16, 24],
        stage_mid_channels=[8] * 4,
        stage_out_channels=out,
        hidden_sizes=out,
        stage_num_blocks=[1] * 4,
        stage_numb_of_layers=[1] * 4,
        depths=[1] * 4,
        embedding_size=8,
        out_features=[f"stage{i}" for i in stages],
    )


def swin(stages: tuple[int, ...]):
    return transformers.SwinConfig(
        image_size=SIDE, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=2, out_indices=list(stages)
    )


def rt_detr_options(stages: tuple[int, ...] = (2, 3, 4)) -> dict:
    """What RT-DETR and its descendants have in common."""
    return {
        "encoder_hidden_dim": DIM,
        "encoder_in_channels": [8 * i for i in stages],
        "encoder_ffn_dim": DIM,
        "encoder_attention_heads": 2,
        "d_model": DIM,
        "num_queries": 10,
        "decoder_in_channels": [DIM] * 3,
        "decoder_ffn_dim": DIM,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "num_denoising": 0,
    }


def detr_options() -> dict:
    """What Deformable DETR and Grounding DINO have in common."""
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": DIM, "decoder_ffn_dim": DIM}
    return {"d_model": DIM, "num_queries": 10, "dropout": 0.0, "num_feature_levels": 4, **heads, **layers}


def pictures() -> dict:
    return {"pixel_values": torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))}


def padded() -> dict:
    """Pictures of two sizes, the second of which is filled up."""
    mask = torch.ones(2, SIDE, SIDE, dtype=torch.long)
    mask[1, :, 40:] = 0
    return {**pictures(), "pixel_mask": mask}


def worded() -> dict:
    """Two pictures and a sentence of two phrases for each."""
    words = torch.tensor([[101, 7, 8, 1012, 9, 1012, 102]] * 2)
    return {**pictures(), "input_ids": words}


def grounding(kind: str) -> nn.Module:
    text = {"hidden_size": DIM, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": DIM}
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=swin((2, 3, 4)),
        text_config={"model_type": "bert", "vocab_size": 1100, "max_position_embeddings": 40, **text},
        max_text_len=20,
        fusion_droppath=0.0,
        **detr_options(),
    )
    return getattr(transformers, f"{kind}ForObjectDetection")(config)


def deformable_detr() -> nn.Module:
    config = transformers.DeformableDetrConfig(backbone_config=resnet(16, 24, 32), **detr_options())
    return transformers.DeformableDetrForObjectDetection(config)


def two_stages() -> nn.Module:
    """Deformable DETR with proposals of the encoder, whose decoder attends around boxes of four numbers."""
    stages = {"two_stage": True, "with_box_refine": True, "two_stage_num_proposals": 10}
    config = transformers.DeformableDetrConfig(backbone_config=resnet(16, 24, 32), **stages, **detr_options())
    return transformers.DeformableDetrForObjectDetection(config)


def rt_detr() -> nn.Module:
    return transformers.RTDetrForObjectDetection(
        transformers.RTDetrConfig(backbone_config=resnet(16, 24, 32), **rt_detr_options())
    )


def rt_detr_v2(**changes) -> nn.Module:
    options = rt_detr_options() | changes
    return transformers.RTDetrV2ForObjectDetection(
        transformers.RTDetrV2Config(backbone_config=resnet(16, 24, 32), **options)
    )


def pp_doclayout_v2() -> nn.Module:
    order = {"hidden_size": DIM, "num_attention_heads": 2, "intermediate_size": DIM, "num_hidden_layers": 1}
    sizes = {"coordinate_size": 6, "shape_size": 4, "global_pointer_head_size": 8, "num_classes": 3}
    config = transformers.PPDocLayoutV2Config(
        backbone_config=hgnet((2, 3, 4)),
        reading_order_config={**order, **sizes},
        num_labels=3,
        class_thresholds=[0.0] * 3,
        class_order=[0, 1, 2],
        **rt_detr_options(),
    )
    return transformers.PPDocLayoutV2ForObjectDetection(config)


def pp_doclayout_v3() -> nn.Module:
    config = transformers.PPDocLayoutV3Config(
        backbone_config=hgnet((1, 2, 3, 4)),
        mask_feature_channels=[8, 8],
        x4_feat_dim=8,
        num_prototypes=8,
        global_pointer_head_size=8,
        **rt_detr_options(),
    )
    return transformers.PPDocLayoutV3ForObjectDetection(config)


def pp_doclayout_v4() -> nn.Module:
    options = {"hidden_size" if name == "d_model" else name: value for name, value in rt_detr_options().items()}
    config = transformers.PPDocLayoutV4Config(
        backbone_config=hgnet((2, 3, 4)), global_pointer_head_size=8, num_labels=3, **options
    )
    return transformers.PPDocLayoutV4ForObjectDetection(config)


def lw_detr() -> nn.Module:
    backbone = transformers.LwDetrViTConfig(
        image_size=SIDE,
        pretrain_image_size=SIDE,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=1,
        window_block_indices=[0],
        out_indices=[1, 2],
        num_windows=4,
    )
    config = transformers.LwDetrConfig(backbone_config=backbone, projector_scale_factors=[0.5, 2.0], **vit_options())
    return transformers.LwDetrForObjectDetection(config)


def rf_detr() -> nn.Module:
    backbone = transformers.RfDetrDinov2Config(
        image_size=SIDE,
        patch_size=16,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=1,
        num_windows=2,
        out_features=["stage1", "stage2"],
    )
    config = transformers.RfDetrConfig(backbone_config=backbone, intermediate_size=DIM, **vit_options())
    return transformers.RfDetrForObjectDetection(config)


def vit_options() -> dict:
    """What LW-DETR and RF-DETR have in common."""
    heads = {"decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 4}
    sizes = {"d_model": DIM, "decoder_ffn_dim": DIM, "decoder_layers": 2, "decoder_n_points": 2, "c2f_num_blocks": 1}
    return {"num_queries": 5, "group_detr": 2, "dropout": 0.0, **heads, **sizes}


def omdet_turbo() -> nn.Module:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": DIM}
    config = transformers.OmDetTurboConfig(
        backbone_config=swin((2, 3, 4)),
        text_config={"model_type": "clip_text_model", "vocab_size": 50, "projection_dim": DIM, **text, **ids},
        apply_layernorm_after_vision_backbone=False,
        image_size=SIDE,
        text_projection_in_dim=24,
        text_projection_out_dim=24,
        task_encoder_hidden_dim=DIM,
        class_embed_dim=24,
        num_queries=10,
        encoder_hidden_dim=DIM,
        vision_features_channels=[DIM] * 3,
        encoder_in_channels=[16, 32, 64],
        encoder_attention_heads=2,
        encoder_dim_feedforward=DIM,
        decoder_hidden_dim=DIM,
        decoder_num_heads=4,
        decoder_num_layers=2,
        decoder_dim_feedforward=DIM,
    )
    return transformers.OmDetTurboForObjectDetection(config)


def asked() -> dict:
    """Two pictures, two classes and a task for each."""
    classes, tasks = torch.tensor([[1, 5, 2], [1, 6, 2], [1, 7, 2], [1, 8, 2]]), torch.tensor([[1, 9, 2]] * 2)
    ones = {"classes_attention_mask": torch.ones_like(classes), "tasks_attention_mask": torch.ones_like(tasks)}
    ids = {"classes_input_ids": classes, "tasks_input_ids": tasks, "classes_structure": torch.tensor([2, 2])}
    return {**pictures(), **ids, **ones}


def mask2former() -> nn.Module:
    config = transformers.Mask2FormerConfig(
        backbone_config=swin((1, 2, 3, 4)),
        feature_size=DIM,
        mask_feature_size=DIM,
        hidden_dim=DIM,
        encoder_feedforward_dim=DIM,
        dim_feedforward=DIM,
        encoder_layers=2,
        decoder_layers=2,
        num_attention_heads=4,
        num_queries=5,
    )
    return transformers.Mask2FormerModel(config)


def oneformer() -> nn.Module:
    config = transformers.OneFormerConfig(
        backbone_config=swin((1, 2, 3, 4)),
        conv_dim=DIM,
        mask_dim=DIM,
        hidden_dim=DIM,
        encoder_feedforward_dim=DIM,
        dim_feedforward=DIM,
        encoder_layers=2,
        decoder_layers=2,
        num_attention_heads=4,
        num_queries=5,
        task_seq_len=7,
        text_encoder_width=DIM,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=20,
        text_encoder_context_length=7,
    )
    return transformers.OneFormerModel(config)


def tasked() -> dict:
    return {**pictures(), "task_inputs": torch.ones(2, 7)}


def d_fine() -> nn.Module:
    options = rt_detr_options() | {"decoder_n_points": [3, 6, 3], "lqe_hidden_dim": 8, "max_num_bins": 4}
    return transformers.DFineForObjectDetection(transformers.DFineConfig(backbone_config=hgnet((2, 3, 4)), **options))


def deimv2() -> nn.Module:
    options = rt_detr_options() | {"lqe_hidden_dim": 8, "max_num_bins": 4}
    return transformers.Deimv2ForObjectDetection(transformers.Deimv2Config(backbone_config=hgnet((2, 3, 4)), **options))


# The families with a sampling module, by the name of their folder in transformers.
SAMPLING: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict]]] = {
    "deformable_detr": (deformable_detr, padded),
    "grounding_dino": (lambda: grounding("GroundingDino"), worded),
    "lw_detr": (lw_detr, pictures),
    "mm_grounding_dino": (lambda: grounding("MMGroundingDino"), worded),
    "omdet_turbo": (omdet_turbo, asked),
    "pp_doclayout_v2": (pp_doclayout_v2, pictures),
    "pp_doclayout_v3": (pp_doclayout_v3, pictures),
    "rf_detr": (rf_detr, pictures),
    "rt_detr": (rt_detr, pictures),
}
if hasattr(transformers, "PPDocLayoutV4Config"):
    SAMPLING["pp_doclayout_v4"] = (pp_doclayout_v4, pictures)
# The families that sample by a function, and whose attention is exchanged as a whole.
WHOLE = {
    "mask2former": (mask2former, pictures),
    "oneformer": (oneformer, tasked),
    "rt_detr_v2": (rt_detr_v2, pictures),
}
# The families that sample by a function, with another number of points in each level.
SKIPPED = {"d_fine": (d_fine, pictures), "deimv2": (deimv2, pictures)}
EXCHANGED = {**SAMPLING, "deformable_detr of two stages": (two_stages, padded), **WHOLE}


def make(family: str) -> tuple[nn.Module, dict]:
    """A model of the family in which every parameter of its attentions matters, and inputs for it."""
    build, inputs = (EXCHANGED | SKIPPED)[family]
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # Fresh weights are small, and those of the offsets are zero. Convolutions are many in a row.
                parameter.normal_(std=(2 if parameter.dim() == 4 else 1) * parameter[0].numel() ** -0.5)
            elif "sampling_offsets" in name:
                # Samples that lie exactly on pixels would have no single gradient.
                parameter.add_(torch.rand(parameter.shape) * 0.8 - 0.4)
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.uniform_(0.5, 1.5)
        # The statistics of these inputs keep the maps from fading on their way through the layers. A copy runs, because
        # a run leaves caches behind.
        given, twin = inputs(), copy.deepcopy(model)
        for part in twin.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.train().momentum = 1.0
        twin(**given)
        model.load_state_dict(twin.state_dict())
    return model, given
