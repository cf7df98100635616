"""Architectures of transformers, each with a tiny configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.zoo.case import Arguments, Case

_ENCODER = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SEQUENCES = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "max_position_embeddings": 40,
}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4}
_AUDIO = {
    **{name: value for name, value in _ENCODER.items() if name != "max_position_embeddings"},
    "conv_dim": (32, 32),
    "conv_kernel": (8, 4),
    "conv_stride": (4, 4),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}
_BACKBONE = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "layer_type": "basic"}


def _tokens() -> Tensor:
    return torch.arange(24).reshape(2, 12) % 90 + 3


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _text() -> Arguments:
    return {"input_ids": _tokens(), "attention_mask": torch.ones(2, 12, dtype=torch.long)}


def _pair() -> Arguments:
    return {"input_ids": _tokens(), "decoder_input_ids": _tokens()}


def _image() -> Arguments:
    return {"pixel_values": _random(2, 3, 32, 32)}


def _picture() -> Arguments:
    return {"pixel_values": _random(2, 3, 64, 64)}


def _text_and_image() -> Arguments:
    return {"input_ids": _tokens(), "pixel_values": _random(2, 3, 32, 32)}


def _waves() -> Arguments:
    return {"input_values": _random(2, 1600)}


def _spectrum() -> Arguments:
    return {"input_features": _random(2, 16, 40), "decoder_input_ids": _tokens()}


_ARCHITECTURES: Mapping[str, tuple[str, str, dict[str, Any], Callable[[], Arguments]]] = {
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**_ENCODER, "embedding_size": 16}, _text),
    "bart": ("BartForConditionalGeneration", "BartConfig", _SEQUENCES, _pair),
    "bert": ("BertForMaskedLM", "BertConfig", _ENCODER, _text),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        _text,
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**_ENCODER, "eos_token_id": 2}, "vision_config": _VISION, "projection_dim": 24},
        _text_and_image,
    ),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]},
        _picture,
    ),
    "deberta_v2": (
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        _text,
    ),
    "detr": (
        "DetrForObjectDetection",
        "DetrConfig",
        {
            **{name: value for name, value in _SEQUENCES.items() if name.partition("_")[0] in ("d", "encoder")},
            **{"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "num_queries": 5},
            **{"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None},
            "backbone_config": {"model_type": "resnet", **_BACKBONE, "out_features": ["stage4"]},
        },
        _picture,
    ),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 40},
        _text,
    ),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", {**_ENCODER, "embedding_size": 16}, _text),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        _text,
    ),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_DECODER, "head_dim": 8}, _text),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 99, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4}
        | {"bos_token_id": 1, "eos_token_id": 2},
        _text,
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _ENCODER, _text),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER, _text),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        lambda: {"input_ids": _tokens()},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": 8}, _text),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_DECODER, "num_local_experts": 4}, _text),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**_ENCODER, "num_hidden_layers": 3, **dict.fromkeys(("pad_token_id", "cls_token_id", "bos_token_id"), 0)}
        | dict.fromkeys(("sep_token_id", "eos_token_id"), 2),
        _text,
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64, "num_attention_heads": 4}
        | {"max_position_embeddings": 40, "word_embed_proj_dim": 16},
        _text,
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**_DECODER, "tie_word_embeddings": True}, _text),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _ENCODER, _text),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "decoder_hidden_size": 32}
        | {"num_attention_heads": [1, 2, 2, 4]},
        _picture,
    ),
    "swin": ("SwinForImageClassification", "SwinConfig", _SWIN, _image),
    "swinv2": ("Swinv2ForImageClassification", "Swinv2Config", _SWIN, _image),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0},
        _pair,
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", _VISION, _image),
    "vit_mae": (
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        {**_VISION, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4}
        | {"decoder_intermediate_size": 64},
        _image,
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", _AUDIO, _waves),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**_SEQUENCES, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 40},
        _spectrum,
    ),
}
"""Name -> class of the model, class of its configuration, the configuration, the inputs."""


def cases() -> list[Case]:
    """List the cases."""
    return [
        Case(name, "transformers", partial(_make, model, config, settings), inputs)
        for name, (model, config, settings, inputs) in _ARCHITECTURES.items()
    ]


def _make(model: str, config: str, settings: dict[str, Any]) -> nn.Module:
    written = getattr(transformers, config)(**settings)
    made: nn.Module = getattr(transformers, model)(written)
    return made
