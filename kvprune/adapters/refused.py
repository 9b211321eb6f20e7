"""Model classes of transformers that no adapter supports although one might expect it, and why."""

from __future__ import annotations

import inspect
import os
import re
from dataclasses import dataclass

from torch import nn

__all__ = ["REFUSED", "Refused", "why_refused"]

_DECODERS = (
    "Bert|BertGeneration|BlipText|Camembert|Data2VecText|Electra|Ernie|GPT2|MegatronBert|Musicgen|Pix2StructText|PPFormulaNetText|RemBert|Roberta|"
    "RobertaPreLayerNorm|RoCBert|RoFormer|Tapas|XGLM|XLMRoberta|XLMRobertaXL|Xmod"
)
"""Families whose decoder is part of another model, such as an `EncoderDecoderModel`."""


@dataclass(frozen=True)
class Refused:
    """A group of model classes that are refused for one reason.

    Args:
        classes: Regular expression that matches their whole names.
        reason: Why, and what would be right, as the end of a sentence.
    """

    classes: str
    reason: str


REFUSED = (
    Refused(
        "FSMT.*",
        "its attention puts time before the batch and takes other arguments; Marian and M2M100 are supported",
    ),
    Refused(
        "T5Gemma2.*",
        "its decoder attends to the text and to encoder states in one softmax; T5Gemma is supported",
    ),
    Refused(
        "MusicgenMelody.*",
        "it has no cross-attention: what it is conditioned on precedes the text; MusicGen is supported",
    ),
    Refused(
        "SpeechT5.*",
        "its decoder takes input_values, and adapters hook decoders that take input_ids; Whisper and others "
        "that read speech are supported",
    ),
    Refused(
        "SeamlessM4T(v2)?(Model|ForTextToSpeech|ForSpeechToSpeech)|SeamlessM4T(v2)?TextToUnit.*",
        "it decodes twice, to text and to units; its ForTextToText and ForSpeechToText are supported",
    ),
    Refused(
        "(Autoformer|Informer|TimeSeriesTransformer)(Model|ForPrediction)",
        "it forecasts numbers, and adapters hook decoders that take input_ids",
    ),
    Refused(
        "DecisionTransformer.*",
        "it predicts actions from a trajectory, which no encoder reads and no cache keeps between calls",
    ),
    Refused(
        "BridgeTower.*",
        "its two encoders attend to each other, and nothing is generated, so there is no cache to prune",
    ),
    Refused(
        "Blt.*", "its cross-attention reads patches of the text that it is writing, so no prompt is whole"
    ),
    Refused(
        "(Flaubert|XLM)(Model|WithLMHeadModel)",
        "transformers generates with it without encoder states",
    ),
    Refused("Kosmos2.*", "it reads its picture among the tokens of its text, without cross-attention"),
    Refused(
        "Rag(Model|SequenceForGeneration|TokenForGeneration)",
        "it runs another model over retrieved documents and weighs what that says; compress the other model, "
        "without Rag around it",
    ),
    Refused(
        "Idefics(Model|ForVisionText2Text)",
        "its cross-attention projects the picture again at each step, so there is no cache to prune",
    ),
    Refused(
        ".*For(SequenceClassification|TokenClassification|QuestionAnswering(Simple)?|MultipleChoice|MaskedLM|"
        "PreTraining|NextSentencePrediction)",
        "it reads its input once and generates nothing, so there is no cache to prune",
    ),
    Refused(".*Encoder(Model)?|.*VisionModel", "it is an encoder alone; compress the whole model"),
    Refused(
        f".*(ForCausalLM|LMHeadModel|DoubleHeadsModel)|({_DECODERS})Model|(BertGeneration|ProphetNet)Decoder",
        "it is a decoder alone; compress the encoder-decoder model that it is part of, if there is one",
    ),
)
"""The first group that matches a name counts."""


def why_refused(model: object) -> str:
    """Return why a model is refused, as the end of a sentence; "" if nothing is known of its class."""
    for base in type(model).__mro__:
        for group in REFUSED:
            if re.fullmatch(group.classes, base.__name__):
                return group.reason
    if isinstance(model, str | os.PathLike):
        return "that is the name of a model; load it with transformers first, and pass the loaded model"
    inner = None if isinstance(model, nn.Module) else inspect.getattr_static(model, "model", None)
    if isinstance(inner, nn.Module):  # a pipeline, a trainer
        return f"that is no model, but holds a {type(inner).__name__}; pass its attribute model (pipe.model)"
    return ""
