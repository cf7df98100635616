"""Models of timm, one or more of each of its families, as small as the family has them."""

from __future__ import annotations

from functools import partial

import timm
import torch
from torch import nn

from benchmarks.zoo.case import Case

RESIZED = """
beit_base_patch16_224 cait_xxs24_224 coat_lite_tiny coat_tiny convit_tiny deit_tiny_distilled_patch16_224
efficientformerv2_s0 efficientvit_m0 eva02_tiny_patch14_224 gcvit_xxtiny gmlp_ti16_224 hiera_tiny_224
lambda_resnet26rpt_256 levit_128s levit_conv_128s mixer_s32_224 mobileone_s0 mobilevit_xxs mobilevitv2_050 mvitv2_tiny
naflexvit_base_patch16_gap nest_tiny pit_ti_224 regnetz_b16 repvgg_a0 repvit_m1 resmlp_12_224 samvit_base_patch16_224
sequencer2d_s swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256 test_byobnet
test_coatnet test_maxvit test_vit test_vit2 test_vit3 test_vit4 test_vit_relpos tnt_s_patch16_224 twins_pcpvt_small
twins_svt_small visformer_tiny vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224
xcit_nano_12_p8_224
"""
"""Models that are told the size of their images: 64 x 64."""

PLAIN = """
caformer_s18 convmixer_1024_20_ks9_p14 convnextv2_atto cpubone_nano crossvit_tiny_240 cs3darknet_s csatv2_21m
cspnext_tiny davit_tiny densenetblur121d dla60x_c dpn68 eca_nfnet_l0 edgenext_xx_small efficientvim_m1 efficientvit_b0
ese_vovnet19b_slim_dw fasternet_t0 fastvit_t8 focalnet_tiny_srf ghostnet_050 ghostnetv2_100 hardcorenas_a hgnetv2_b0
hrnet_w18_small iformer_t inception_next_atto lcnet_035 lcnetv2_small legacy_seresnet18 legacy_xception lowformer_b0
mobilenetv3_small_050 mobilenetv4_conv_small_035 mobilenetv5_300m nasnetalarge nextvit_small nf_regnet_b0 pnasnet5large
poolformer_s12 pvt_v2_b0 rdnet_tiny regnetx_002 regnety_002 repghostnet_050 res2net50_14w_8s resnest14d resnet10t
resnetv2_18 resnetv2_50x1_bit rexnet_100 sam2_hiera_tiny selecsls60 seresnet18 shvit_s1 skresnet18 starnet_s050
test_convnext test_convnext2 test_convnext3 test_efficientnet test_efficientnet_ln test_mambaout test_nfnet test_resnet
tf_efficientnet_b0 tiny_vit_5m_224 tinynet_e tresnet_m xception41p
"""
"""Models that take images of 64 x 64 as they are."""

OTHERS = {
    "efficientformer_l1": 224,
    "halonet_h1": 256,
    "inception_resnet_v2": 96,
    "inception_v3": 96,
    "inception_v4": 96,
}
"""Models that take no smaller images -> the edge of theirs."""


def cases() -> list[Case]:
    """List the cases."""
    return [
        *(_case(name, 64, img_size=64) for name in RESIZED.split()),
        *(_case(name, 64) for name in PLAIN.split()),
        *(_case(name, size) for name, size in OTHERS.items()),
    ]


def _make(name: str, **settings: object) -> nn.Module:
    made: nn.Module = timm.create_model(name, pretrained=False, **settings)
    return made


def _case(name: str, size: int, **settings: object) -> Case:
    generator = torch.Generator()
    return Case(
        name,
        "timm",
        partial(_make, name, **settings),
        lambda: (torch.randn(2, 3, size, size, generator=generator.manual_seed(0)),),
    )
