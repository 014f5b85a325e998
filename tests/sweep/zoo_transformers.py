"""Small models of transformers with batch norms, and inputs that they run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from .sources import Attempt, Candidate, numbered

# One class of each architecture: that with the most norms.
PIXELS = """
AlignVisionModel BeitForSemanticSegmentation ConditionalDetrForObjectDetection
CvtForImageClassification DFineForObjectDetection DabDetrForObjectDetection
Data2VecVisionForSemanticSegmentation DeformableDetrForObjectDetection Deimv2ForObjectDetection
DetrForObjectDetection DetrForSegmentation DPTForSemanticSegmentation
EfficientNetForImageClassification GLPNForDepthEstimation HGNetV2ForImageClassification
LevitForImageClassificationWithTeacher MobileNetV1ForImageClassification
MobileNetV2ForSemanticSegmentation MobileViTForSemanticSegmentation
MobileViTV2ForSemanticSegmentation PPDocLayoutV2ForObjectDetection
PPDocLayoutV3ForObjectDetection PPDocLayoutV4ForObjectDetection PPLCNetForImageClassification
PPLCNetV3Backbone PPLCNetV4Backbone PPOCRV5MobileDetForObjectDetection
PPOCRV5MobileRecForTextRecognition PPOCRV5ServerRecForTextRecognition
PPOCRV6SmallRecForTextRecognition
PPOCRV6TinyRecForTextRecognition RegNetForImageClassification ResNetForImageClassification
RTDetrForObjectDetection RTDetrV2ForObjectDetection SLANetForTableRecognition
SegformerForSemanticSegmentation SwiftFormerForImageClassification
TableTransformerForObjectDetection TextNetForImageClassification TimmWrapperForImageClassification
UperNetForSemanticSegmentation UVDocBackbone
Sapiens2ForSemanticSegmentation TimmBackbone
""".split()
SIZES = (64, 96, 224)
# What a configuration may not have more of.
MOST = {"layers": 2, "num_queries": 10, "vocab_size": 512, "num_denoising": 0, "layerdrop": 0}
_SPEECH = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}
_BEIT = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], **_SPEECH}
_HEAD = {"upsample_out_channels": [16], "conv_out_channels": [16]}
CHANGES: dict[str, dict[str, Any]] = {
    "BeitForSemanticSegmentation": _BEIT,
    "Data2VecVisionForSemanticSegmentation": _BEIT,
    "DPTForSemanticSegmentation": {"num_hidden_layers": 12, **_SPEECH},
    "Sapiens2ForSemanticSegmentation": {"head_config": _HEAD, **_SPEECH},
    "TimmBackbone": {"backbone": "resnet18"},
}


def float_rows(rows: Sequence[int], dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.stack([numbered(r, *shape) for r in rows]).to(dtype)


def token_rows(rows: Sequence[int], length: int = 8) -> Tensor:
    generators = [torch.Generator().manual_seed(r) for r in rows]
    return torch.stack([torch.randint(5, 60, (length,), generator=g) for g in generators])


def named(
    tokens: Sequence[str] = (), constant: dict[str, Tensor] | None = None, **shapes: tuple[int, ...]
) -> Callable[..., dict[str, Tensor]]:
    """Give inputs by name: noise of a shape a sample, token numbers, or the same for each."""

    def make(rows: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
        inputs = {name: float_rows(rows, dtype, *shape) for name, shape in shapes.items()}
        inputs |= {name: token_rows(rows) for name in tokens}
        for name, value in (constant or {}).items():
            inputs[name] = torch.stack([value] * len(rows))
        return inputs

    return make


_WAVES = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8)}
_WAVES |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8}
_WAVES |= {"num_conv_pos_embedding_groups": 2, **_SPEECH}
_SERIES = {"prediction_length": 4, "context_length": 16, "lags_sequence": [1, 2], "d_model": 16}
_SERIES |= {"use_cache": False, "attention_type": "full", "num_time_features": 2, "input_size": 1}
_SERIES_INPUTS = {"past_values": (18,), "past_time_features": (18, 2)}
_SERIES_INPUTS |= {"future_values": (4,), "future_time_features": (4, 2)}
# class: (changes of its configuration, inputs)
OTHERS: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "AlignModel": ({}, named(["input_ids"], pixel_values=(3, 64, 64))),
    "ClapAudioModelWithProjection": (
        {},
        named(input_features=(1, 1001, 64), constant={"is_longer": torch.zeros(1).bool()}),
    ),
    "EfficientLoFTRForKeypointMatching": ({}, named(pixel_values=(2, 3, 64, 64))),
    "FastSpeech2ConformerModel": (
        {},
        named(
            ["input_ids"],
            constant={"duration_labels": torch.full((8,), 2)},
            spectrogram_labels=(16, 80),
            pitch_labels=(8, 1),
            energy_labels=(8, 1),
        ),
    ),
    "GraniteSpeech5ForCTC": ({}, named(input_features=(64, 320))),
    "GraniteSpeechCTCEncoder": ({}, named(hidden_states=(40, 160))),
    "GraniteSpeechPlusCTCEncoder": ({}, named(hidden_states=(40, 160))),
    "GroupViTModel": ({}, named(["input_ids"], pixel_values=(3, 224, 224))),
    "InformerModel": (
        _SERIES,
        named(constant={"past_observed_mask": torch.ones(18)}, **_SERIES_INPUTS),
    ),
    "LasrForCTC": ({}, named(input_features=(64, 128))),
    "ParakeetForCTC": ({**_SPEECH, "num_key_value_heads": 4}, named(input_features=(64, 80))),
    "PatchTSTForPrediction": (
        {"context_length": 32, "patch_length": 4, "patch_stride": 4, "num_input_channels": 2},
        named(past_values=(32, 2)),
    ),
    "Sam3LiteTextTextModel": ({}, named(["input_ids"])),
    "models.seamless_m4t.modeling_seamless_m4t.SeamlessM4TSpeechEncoder": (
        _SPEECH,
        named(input_features=(40, 160)),
    ),
    "SpeechT5ForTextToSpeech": (
        {"speech_decoder_prenet_dropout": 0.0, "use_cache": False},
        named(["input_ids"], decoder_input_values=(8, 80), speaker_embeddings=(512,)),
    ),
    "SuperGlueForKeypointMatching": ({}, named(pixel_values=(2, 3, 96, 96))),
    "Wav2Vec2ConformerForSequenceClassification": (_WAVES, named(input_values=(800,))),
}


def shrink(config: Any, changes: dict[str, Any]) -> None:
    """Change a configuration and those inside it, as far as they have what is changed."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "model_type"):
            shrink(value, changes)
            continue
        for ending, most in MOST.items():
            if name.endswith(ending) and type(value) in (int, float):
                setattr(config, name, min(value, most))
    for name, value in changes.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, value)


def build(name: str, changes: dict[str, Any], **sizes: int) -> nn.Module:
    """Build a class with random weights and a small configuration."""
    import transformers

    cls: Any = reduce(getattr, name.split("."), transformers)
    config = cls.config_class(**changes)
    shrink(config, {**{k: v for k, v in changes.items() if isinstance(v, int)}, **sizes})
    config._attn_implementation, config.output_hidden_states = "eager", True
    model: nn.Module = cls(config)
    return model


def models() -> Iterator[Candidate]:
    for name in PIXELS:
        attempts = [
            Attempt(f"{s} px", {"image_size": s}, named(pixel_values=(3, s, s))) for s in SIZES
        ]
        attempts += [Attempt(f"{s} px", {}, named(pixel_values=(3, s, s))) for s in (64, 224)]
        changes = CHANGES.get(name, {})
        yield Candidate(name, "transformers", partial(build, name, changes), attempts)
    for name, (changes, make) in OTHERS.items():
        attempt = Attempt("named inputs", {}, make)
        yield Candidate(name, "transformers", partial(build, name, changes), [attempt])
