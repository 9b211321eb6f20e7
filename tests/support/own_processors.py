"""Families with processors of their own: tiny random models, trained tokenizers, and real files to read.

`FAMILIES` says for each family how to make its model and its processor, and how a user prepares two samples
with it. `saved` writes both to a folder, from which tests load them as users do. Pictures are drawn and saved
as PNG files of different sizes; recordings are those of the demo of speech.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import soundfile
import torch
import transformers
from own_tokenizers import (
    bart_tokenizer,
    bert_tokenizer,
    marian_tokenizer,
    mbart_tokenizer,
    nllb_tokenizer,
    nougat_tokenizer,
    plain_tokenizer,
    seamless_tokenizer,
    speech2text_tokenizer,
    t5_tokenizer,
    udop_tokenizer,
    whisper_tokenizer,
)
from PIL import Image, ImageDraw

from kvprune.demo.recordings import speech_data
from kvprune.testing import enliven

__all__ = [
    "FAMILIES",
    "PICTURES",
    "Files",
    "Loaded",
    "OwnProcessor",
    "draw_pictures",
    "load",
    "recordings",
    "saved",
]

Inputs = dict[str, Any]
Files = Sequence[Path]

PICTURES = (60, 40), (32, 72), (90, 90)
"""Width and height of the pictures: lying, standing, square."""

TEXTS = "he was not an ill disposed young man", "had he married a more amiable woman he might have been"


@dataclass(frozen=True)
class OwnProcessor:
    """How to make a family's model and processor, and how a user prepares samples.

    Args:
        auto: Class of transformers that loads the model.
        processor: Makes the processor, or a tokenizer if the family has no processor.
        model: Makes the model, given the tokenizer.
        inputs: Prepares samples, given the processor and the files of pictures.
        options: Further options of ``generate``, given the tokenizer.
        loads: Class of transformers that loads the processor.
        seed: Seed of the weights: with some, a model says the same whatever it hears.
    """

    auto: str
    processor: Callable[[], Any]
    model: Callable[[Any], Any]
    inputs: Callable[[Any, Files], Inputs]
    options: Callable[[Any], Inputs] = field(default=lambda tokenizer: {})
    loads: str = "AutoProcessor"
    seed: int = 1


def draw_pictures(folder: Path) -> list[Path]:
    """Draw pictures of several sizes, and save them as PNG files."""
    paths = []
    for place, (width, height) in enumerate(PICTURES):
        picture = Image.new("RGB", (width, height), "white")
        pen = ImageDraw.Draw(picture)
        for step in range(0, width, 7):
            colour = (37 * step % 256, 91 * step % 256, 60 * place)
            pen.rectangle((step, height // 5 + step % 11, step + 4, height - 6), fill=colour)
        pen.ellipse((width // 4, height // 4, width // 2, height // 2), fill="red")
        pen.text((3, 2), f"page {place}", fill="black")
        paths.append(folder / f"picture-{place}.png")
        picture.save(paths[-1])
    return paths


def opened(files: Files) -> list[Any]:
    """Return the pictures in files."""
    return [Image.open(path).convert("RGB") for path in files]


@functools.cache
def recordings() -> tuple[Any, ...]:
    """Return the recordings of the demo as float32 at 16 kHz, ``[N]`` each, the two shortest first."""
    lines = speech_data().read_text("utf-8").splitlines()
    paths = [speech_data().parent / json.loads(line)["audio"] for line in lines]
    return tuple(sorted((soundfile.read(path, dtype="float32")[0] for path in paths), key=len))


def saved(name: str, folder: Path) -> Path:
    """Write the model and the processor of a family to a folder, and return it."""
    family = FAMILIES[name]
    processor = family.processor()
    tokenizer = getattr(processor, "tokenizer", processor)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = enliven(family.model(tokenizer).eval(), family.seed)
    model.generation_config._from_model_config = False  # else loading makes it anew from the model's config
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Loaded:
    """What a user has who loaded a family from a folder.

    Args:
        family: What is known of the family.
        processor: Its processor, or its tokenizer if it has none.
        model: Its model.
    """

    family: OwnProcessor
    processor: Any
    model: Any

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def options(self) -> Inputs:
        """Further options of ``generate``."""
        return self.family.options(self.tokenizer)

    def inputs(self, files: Files) -> Inputs:
        """Return what the processor makes of as many samples as there are files."""
        return self.family.inputs(self.processor, files)

    def open(self, files: Files) -> list[Any]:
        """Return the pictures in files."""
        return opened(files)

    def texts(self, sequences: Any) -> list[str]:
        """Return what sequences say, with the special tokens."""
        return self.processor.batch_decode(sequences)


def load(name: str, folder: Path, **options: Any) -> Loaded:
    """Load the model and the processor of a family from a folder."""
    family = FAMILIES[name]
    processor = getattr(transformers, family.loads).from_pretrained(folder)
    model = getattr(transformers, f"AutoModelFor{family.auto}").from_pretrained(folder, **options)
    return Loaded(family, processor, model)


# What the tiny models have in common.


def tokens(tokenizer: Any) -> Inputs:
    """Return the vocabulary of a model for a tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def like_bart(tokenizer: Any, **changes: Any) -> Inputs:
    """Return the options of a model with BART's layers."""
    return {
        **tokens(tokenizer),
        "decoder_start_token_id": tokenizer.eos_token_id,
        "forced_eos_token_id": None,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 128,
        **changes,
    }


def like_t5(tokenizer: Any, **changes: Any) -> Inputs:
    """Return the options of a model with T5's layers."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    start = {"decoder_start_token_id": tokenizer.pad_token_id}
    return {**tokens(tokenizer), **sizes, **start, **changes}


VIT: Mapping[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
SIZE = {"height": 32, "width": 32}
PAGE = {"height": 64, "width": 48}


def pair(encoder: Any, decoder: Any, tokenizer: Any, kind: str) -> Any:
    """Return a model of an encoder and a decoder, ``kind`` is "Vision" or "Speech"."""
    config = getattr(transformers, f"{kind}EncoderDecoderConfig").from_encoder_decoder_configs(
        encoder, decoder
    )
    config.decoder_start_token_id = tokenizer.bos_token_id
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    return getattr(transformers, f"{kind}EncoderDecoderModel")(config)


# Pictures and pages.


def trocr_model(tokenizer: Any) -> Any:
    decoder = transformers.TrOCRConfig(
        **tokens(tokenizer),
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
    )
    return pair(transformers.ViTConfig(**VIT), decoder, tokenizer, "Vision")


def donut_model(tokenizer: Any) -> Any:
    encoder = transformers.DonutSwinConfig(
        image_size=[PAGE["height"], PAGE["width"]],
        patch_size=4,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=4,
    )
    decoder = transformers.MBartConfig(
        **like_bart(tokenizer, encoder_layers=2), is_decoder=True, add_cross_attention=True
    )
    return pair(encoder, decoder, tokenizer, "Vision")


def donut_inputs(processor: Any, files: Files) -> Inputs:
    prompt = processor.tokenizer("<s_page>", add_special_tokens=False, return_tensors="pt").input_ids
    pixels = processor(opened(files), return_tensors="pt").pixel_values
    return {"pixel_values": pixels, "decoder_input_ids": prompt.expand(len(pixels), -1)}


def pixels_only(processor: Any, files: Files) -> Inputs:
    return {"pixel_values": processor(images=opened(files), return_tensors="pt").pixel_values}


def florence_processor() -> Any:
    pictures = transformers.CLIPImageProcessor(
        size=SIZE, do_center_crop=False, resample=3, image_seq_length=17
    )
    tokenizer = bart_tokenizer(image_token="<image>")
    return transformers.Florence2Processor(image_processor=pictures, tokenizer=tokenizer)


def florence_model(tokenizer: Any) -> Any:
    vision = {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [16, 32],
        "num_heads": [2, 4],
        "num_groups": [2, 4],
        "window_size": 4,
        "projection_dim": 32,
        "max_temporal_embeddings": 4,
        "max_position_embeddings": 8,
    }
    config = transformers.Florence2Config(
        text_config=like_bart(tokenizer, model_type="bart"),
        vision_config=vision,
        image_token_id=tokenizer.image_token_id,
    )
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return transformers.Florence2ForConditionalGeneration(config)


def florence_inputs(processor: Any, files: Files) -> Inputs:
    texts = ["<OD>", "<CAPTION_TO_PHRASE_GROUNDING>a red circle on the page", "<OCR>"][: len(files)]
    return dict(processor(images=opened(files), text=texts, padding=True, return_tensors="pt"))


def pix2struct_processor() -> Any:
    pictures = transformers.Pix2StructImageProcessor(
        patch_size={"height": 8, "width": 8}, max_patches=24, is_vqa=True
    )
    return transformers.Pix2StructProcessor(image_processor=pictures, tokenizer=t5_tokenizer())


def pix2struct_model(tokenizer: Any) -> Any:
    sizes = {"hidden_size": 32, "d_kv": 8, "d_ff": 64}
    text = {**tokens(tokenizer), **sizes, "num_layers": 2, "num_heads": 4, "use_cache": True}
    vision = {**sizes, "patch_embed_hidden_size": 3 * 8 * 8, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.Pix2StructConfig(
        text_config={**text, "decoder_start_token_id": tokenizer.pad_token_id},
        vision_config={**vision, "seq_len": 64},
    )
    return transformers.Pix2StructForConditionalGeneration(config)


def pix2struct_inputs(processor: Any, files: Files) -> Inputs:
    import matplotlib

    reader = processor.image_processor
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    # It would download Arial.
    reader.render_header = lambda page, text, **_: type(reader).render_header(
        reader, page, text, font_path=str(font)
    )
    questions = ["What is on the page?", "How many bars does the picture have, and which is red?", "Why?"]
    return dict(
        processor(
            images=opened(files),
            text=questions[: len(files)],
            max_patches=24,
            return_tensors="pt",
        )
    )


def blip_model(tokenizer: Any) -> Any:
    text = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id or tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "hidden_size": 32,
        "encoder_hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    config = transformers.BlipConfig(text_config=text, vision_config=dict(VIT))
    return transformers.BlipForConditionalGeneration(config)


def blip_inputs(processor: Any, files: Files) -> Inputs:
    texts = ["a picture of"] * len(files)
    return dict(processor(images=opened(files), text=texts, padding=True, return_tensors="pt"))


def udop_inputs(processor: Any, files: Files) -> Inputs:
    words = [["he", "was", "not", "an", "amiable", "man"], ["page", "one"], ["made"]][: len(files)]
    boxes = [[[90 * n, 100, 90 * n + 80, 160] for n in range(len(row))] for row in words]
    return dict(
        processor(
            opened(files),
            ["what is it?"] * len(files),
            text_pair=words,
            boxes=boxes,
            padding=True,
            return_tensors="pt",
        )
    )


# Speech.


def heard(processor: Any, files: Files) -> Inputs:
    sounds = list(recordings()[: len(files)])
    return dict(processor(audio=sounds, sampling_rate=16_000, padding=True, return_tensors="pt"))


def wave_processor(**options: Any) -> Any:
    ears = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True, **options)
    return transformers.Wav2Vec2Processor(feature_extractor=ears, tokenizer=plain_tokenizer())


def moonshine_model(tokenizer: Any) -> Any:
    config = transformers.MoonshineConfig(
        **tokens(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        decoder_start_token_id=tokenizer.bos_token_id,
    )
    return transformers.MoonshineForConditionalGeneration(config)


def speech2text_model(tokenizer: Any) -> Any:
    config = transformers.Speech2TextConfig(
        **like_bart(tokenizer), input_feat_per_channel=16, conv_channels=16, max_source_positions=400
    )
    return transformers.Speech2TextForConditionalGeneration(config)


def seamless_model(tokenizer: Any) -> Any:
    config = transformers.SeamlessM4TConfig(
        **tokens(tokenizer),
        hidden_size=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        speech_encoder_layers=1,
        speech_encoder_attention_heads=4,
        speech_encoder_intermediate_size=64,
        feature_projection_input_dim=32,
        max_position_embeddings=64,
        num_adapter_layers=1,
        decoder_start_token_id=tokenizer.eos_token_id,
    )
    model = transformers.SeamlessM4TForSpeechToText(config)
    codes = {code: tokenizer.convert_tokens_to_ids(f"__{code}__") for code in ("eng", "fra")}
    model.generation_config.text_decoder_lang_to_code_id = codes
    return model


def speech_pair(tokenizer: Any) -> Any:
    encoder = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=[16, 16],
        conv_stride=[40, 16],
        conv_kernel=[40, 16],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
    )
    decoder = transformers.MBartConfig(
        **like_bart(tokenizer, encoder_layers=2), is_decoder=True, add_cross_attention=True
    )
    return pair(encoder, decoder, tokenizer, "Speech")


def streaming_processor() -> Any:
    ears = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    return transformers.MoonshineStreamingProcessor(feature_extractor=ears, tokenizer=plain_tokenizer())


def streaming_model(tokenizer: Any) -> Any:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 64}
    encoder = {**heads, "hidden_size": 32, "num_hidden_layers": 1, "sliding_windows": [[8, 2]]}
    config = transformers.MoonshineStreamingConfig(
        **tokens(tokenizer),
        **heads,
        hidden_size=32,
        num_hidden_layers=2,
        max_position_embeddings=1024,
        encoder_config={**encoder, "model_type": "moonshine_streaming_encoder"},
        decoder_start_token_id=tokenizer.bos_token_id,
    )
    return transformers.MoonshineStreamingForConditionalGeneration(config)


PARAKEET: Mapping[str, Any] = {
    "model_type": "parakeet_encoder",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "subsampling_conv_channels": 8,
    "num_mel_bins": 16,
}
TRANSFORMER: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
PROMPT = "<|startofcontext|>", "<|startoftranscript|>", "<|emo:undefined|>", "<|en|>", "<|fr|>", "<|pnc|>"
PROMPT_END = "<|noitn|>", "<|notimestamp|>", "<|nodiarize|>"


def canary_processor() -> Any:
    ears = transformers.ParakeetFeatureExtractor(feature_size=16)
    return transformers.CanaryProcessor(
        feature_extractor=ears, tokenizer=plain_tokenizer(*PROMPT, *PROMPT_END)
    )


def canary_model(tokenizer: Any) -> Any:
    config = transformers.CanaryConfig(
        encoder_config=dict(PARAKEET),
        decoder_config=dict(TRANSFORMER, model_type="canary_decoder", vocab_size=len(tokenizer)),
        decoder_start_token_id=tokenizer.bos_token_id,
        **tokens(tokenizer),
    )
    return transformers.CanaryForConditionalGeneration(config)


def canary_inputs(processor: Any, files: Files) -> Inputs:
    """One prompt transcribes and one translates."""
    prompts = ["".join((*PROMPT[:4], language, "<|pnc|>")) for language in ("<|fr|>", "<|en|>", "<|fr|>")]
    sounds = list(recordings()[: len(files)])
    return dict(processor(audio=sounds, text=prompts[: len(files)]))


def cohere_processor() -> Any:
    """It cuts a longer recording into chunks of two seconds, which are rows of the batch."""
    ears = transformers.CohereAsrFeatureExtractor(
        feature_size=16, max_audio_clip_s=2.0, overlap_chunk_second=0.5, dither=0.0
    )
    tokenizer = plain_tokenizer(*PROMPT, *PROMPT_END)
    return transformers.CohereAsrProcessor(feature_extractor=ears, tokenizer=tokenizer)


def cohere_model(tokenizer: Any) -> Any:
    config = transformers.CohereAsrConfig(
        **TRANSFORMER,
        **tokens(tokenizer),
        encoder_config=dict(PARAKEET),
        decoder_start_token_id=tokenizer.bos_token_id,
    )
    return transformers.CohereAsrForConditionalGeneration(config)


def cohere_inputs(processor: Any, files: Files) -> Inputs:
    sounds = list(recordings()[: len(files)])
    return dict(processor(audio=sounds, language="en", sampling_rate=16_000))


def whisper_model(tokenizer: Any) -> Any:
    start = tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    config = transformers.WhisperConfig(
        **like_bart(
            tokenizer, decoder_start_token_id=start, suppress_tokens=None, begin_suppress_tokens=None
        ),
        num_mel_bins=8,
        max_source_positions=150,
        max_target_positions=64,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    settings, ids = model.generation_config, tokenizer.convert_tokens_to_ids
    settings.is_multilingual, settings.decoder_start_token_id = True, start
    settings.lang_to_id = {f"<|{code}|>": ids(f"<|{code}|>") for code in ("en", "de")}
    settings.task_to_id = {task: ids(f"<|{task}|>") for task in ("transcribe", "translate")}
    settings.no_timestamps_token_id = ids("<|notimestamps|>")
    settings.max_initial_timestamp_index = 10
    settings.max_length = 64
    # A random model says times where none are asked for, and each one begins a segment.
    settings.suppress_tokens = list(range(ids("<|0.00|>"), len(tokenizer)))
    return model


def whisper_processor() -> Any:
    ears = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=3)
    return transformers.WhisperProcessor(feature_extractor=ears, tokenizer=whisper_tokenizer())


def whisper_inputs(processor: Any, files: Files) -> Inputs:
    sounds = [sound[: 48_000 - 7000 * place] for place, sound in enumerate(recordings()[: len(files)])]
    return dict(processor(sounds, sampling_rate=16_000, return_tensors="pt"))


# Texts.


def read(tokenizer: Any, files: Files) -> Inputs:
    return dict(tokenizer(list(TEXTS[: len(files)]), padding=True, return_tensors="pt"))


def _translate_to(code: str) -> Callable[[Any], Inputs]:
    return lambda tokenizer: {"forced_bos_token_id": tokenizer.convert_tokens_to_ids(code)}


IMAGES, SPEECH, SEQUENCES = "ImageTextToText", "SpeechSeq2Seq", "Seq2SeqLM"

FAMILIES: Mapping[str, OwnProcessor] = {
    "TrOCR": OwnProcessor(
        IMAGES,
        lambda: transformers.TrOCRProcessor(transformers.ViTImageProcessor(size=SIZE), bart_tokenizer()),
        trocr_model,
        pixels_only,
    ),
    "Donut": OwnProcessor(
        IMAGES,
        lambda: transformers.DonutProcessor(
            transformers.DonutImageProcessor(size=PAGE), mbart_tokenizer("<s_page>", "</s_page>")
        ),
        donut_model,
        donut_inputs,
    ),
    "Nougat": OwnProcessor(
        IMAGES,
        lambda: transformers.NougatProcessor(
            transformers.NougatImageProcessor(size=PAGE), nougat_tokenizer()
        ),
        donut_model,
        pixels_only,
    ),
    "Florence-2": OwnProcessor(IMAGES, florence_processor, florence_model, florence_inputs),
    "Pix2Struct": OwnProcessor(IMAGES, pix2struct_processor, pix2struct_model, pix2struct_inputs),
    "BLIP": OwnProcessor(
        IMAGES,
        lambda: transformers.BlipProcessor(transformers.BlipImageProcessor(size=SIZE), bert_tokenizer()),
        blip_model,
        blip_inputs,
    ),
    "UDOP": OwnProcessor(
        IMAGES,
        lambda: transformers.UdopProcessor(
            transformers.LayoutLMv3ImageProcessor(size=SIZE, apply_ocr=False), udop_tokenizer()
        ),
        lambda tokenizer: transformers.UdopForConditionalGeneration(
            transformers.UdopConfig(**like_t5(tokenizer), image_size=32, patch_size=8)
        ),
        udop_inputs,
    ),
    "Moonshine": OwnProcessor(SPEECH, wave_processor, moonshine_model, heard),
    "Speech2Text": OwnProcessor(
        SPEECH,
        lambda: transformers.Speech2TextProcessor(
            transformers.Speech2TextFeatureExtractor(feature_size=16, num_mel_bins=16),
            speech2text_tokenizer(),
        ),
        speech2text_model,
        heard,
        seed=3,
    ),
    "SeamlessM4T": OwnProcessor(
        SPEECH,
        lambda: transformers.SeamlessM4TProcessor(
            transformers.SeamlessM4TFeatureExtractor(feature_size=16, num_mel_bins=16, stride=2),
            seamless_tokenizer(),
        ),
        seamless_model,
        heard,
        lambda tokenizer: {"tgt_lang": "fra"},
    ),
    "speech encoder-decoder": OwnProcessor(SPEECH, wave_processor, speech_pair, heard),
    "Moonshine Streaming": OwnProcessor(SPEECH, streaming_processor, streaming_model, heard),
    "Canary": OwnProcessor(SPEECH, canary_processor, canary_model, canary_inputs, seed=3),
    "Cohere ASR": OwnProcessor(SPEECH, cohere_processor, cohere_model, cohere_inputs),
    "Whisper": OwnProcessor(
        SPEECH,
        whisper_processor,
        whisper_model,
        whisper_inputs,
        lambda tokenizer: {"language": "en", "task": "transcribe"},
    ),
    "T5": OwnProcessor(
        SEQUENCES,
        t5_tokenizer,
        lambda tokenizer: transformers.T5ForConditionalGeneration(
            transformers.T5Config(**like_t5(tokenizer))
        ),
        read,
        loads="AutoTokenizer",
    ),
    "NLLB": OwnProcessor(
        SEQUENCES,
        nllb_tokenizer,
        lambda tokenizer: transformers.M2M100ForConditionalGeneration(
            transformers.M2M100Config(**like_bart(tokenizer))
        ),
        read,
        _translate_to("fra_Latn"),
        loads="AutoTokenizer",
    ),
    "Marian": OwnProcessor(
        SEQUENCES,
        marian_tokenizer,
        lambda tokenizer: transformers.MarianMTModel(
            transformers.MarianConfig(**like_bart(tokenizer, decoder_start_token_id=tokenizer.pad_token_id))
        ),
        read,
        loads="AutoTokenizer",
    ),
}
"""The families by name."""
