"""Which model classes are supported and which are refused: docs/models.md, made from the declarations.

`python tests/models_page.py` writes the page; a test fails while the page is older than the declarations.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent / "support"))

import transformers
from caching_classes import caching_classes
from decoder_pairs import PAIRS, STOCK_FAILS

from kvprune.adapters.base import ModelAdapter
from kvprune.adapters.families import FAMILIES
from kvprune.adapters.mllama import MllamaAdapter
from kvprune.adapters.refused import REFUSED, why_refused
from kvprune.adapters.tiny.families import TINY_FAMILIES
from kvprune.session.registry import load

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"

HEAD = """# Which models are supported

Find the class of your model (`type(model).__name__`) on this page. What derives from a supported class is
supported, too. Everything else raises `UnsupportedModelError`; for the classes under [Refused](#refused),
the error says why. `python tests/models_page.py` writes this page from the declarations in
`kvprune/adapters/families/`, here with transformers {version}, and a test fails when it is stale. Older
releases, down to 5.17, lack some of the classes.

* **Verified** names the settings in which tests compare tiny random models of the real classes with stock
  transformers, each with each. Under `full`, sequences and logits are bit-identical. Under `norm`, `h2o`,
  `trim` and `divprune`, logits are those of the untouched model with the dropped columns masked (KV13):
  at most 1e-5 off in float32, relative to the largest logit. *Padding* is padding of the encoder's input.
  A setting that is not named does not exist in stock transformers, unless the note says otherwise.
* **Refuses** names the built-in policies that need something that the family cannot show; they are
  refused before anything runs. {common} are refused by all but Llama-3.2-Vision: they need the
  attention of a class token in each tile, or (`quecc`) a pass over the prompt's text without its picture.
  All other built-in policies are compared as above on all
  classes, too (`pytest -m slow tests/adapters/test_family_policies.py`).
* **Published** names checkpoints of the class. They were not all run.
"""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "Text": ("kvprune.adapters.families.texts",),
    "Speech and music": ("kvprune.adapters.families.speech", "kvprune.adapters.families.whisper"),
    "Pictures and pages": ("kvprune.adapters.families.pictures",),
    "Llama-3.2-Vision": (MllamaAdapter.__module__,),
}
"""Heading: the files whose adapters stand below it."""

TEXT_TOKEN, FRAME, PATCH = "text token", "audio frame", "image patch"
CHECKPOINTS: Mapping[str, tuple[str, str]] = {
    "BartForConditionalGeneration": (TEXT_TOKEN, "facebook/bart-large-cnn, facebook/bart-large-xsum"),
    "T5ForConditionalGeneration": (TEXT_TOKEN, "google-t5/t5-base, google/flan-t5-large"),
    "MT5ForConditionalGeneration": (TEXT_TOKEN, "google/mt5-base, csebuetnlp/mT5_multilingual_XLSum"),
    "UMT5ForConditionalGeneration": (TEXT_TOKEN, "google/umt5-small"),
    "LongT5ForConditionalGeneration": (TEXT_TOKEN, "google/long-t5-tglobal-base, google/long-t5-local-base"),
    "MBartForConditionalGeneration": (TEXT_TOKEN, "facebook/mbart-large-50-many-to-many-mmt"),
    "M2M100ForConditionalGeneration": (TEXT_TOKEN, "facebook/m2m100_418M, facebook/nllb-200-distilled-600M"),
    "NllbMoeForConditionalGeneration": (TEXT_TOKEN, "facebook/nllb-moe-54b"),
    "MarianMTModel": (TEXT_TOKEN, "Helsinki-NLP/opus-mt-en-de and the other pairs"),
    "PegasusForConditionalGeneration": (TEXT_TOKEN, "google/pegasus-xsum, google/pegasus-large"),
    "PegasusXForConditionalGeneration": (TEXT_TOKEN, "google/pegasus-x-base"),
    "BigBirdPegasusForConditionalGeneration": (TEXT_TOKEN, "google/bigbird-pegasus-large-arxiv"),
    "BlenderbotForConditionalGeneration": (TEXT_TOKEN, "facebook/blenderbot-400M-distill"),
    "BlenderbotSmallForConditionalGeneration": (TEXT_TOKEN, "facebook/blenderbot_small-90M"),
    "PLBartForConditionalGeneration": (TEXT_TOKEN, "uclanlp/plbart-base"),
    "MvpForConditionalGeneration": (TEXT_TOKEN, "RUCAIBox/mvp"),
    "LEDForConditionalGeneration": (TEXT_TOKEN, "allenai/led-base-16384"),
    "ProphetNetForConditionalGeneration": (TEXT_TOKEN, "microsoft/prophetnet-large-uncased"),
    "SwitchTransformersForConditionalGeneration": (TEXT_TOKEN, "google/switch-base-8"),
    "T5GemmaForConditionalGeneration": (TEXT_TOKEN, "google/t5gemma-2b-2b-prefixlm-it"),
    "EncoderDecoderModel": (TEXT_TOKEN, "google/bert2bert_L-24_wmt_en_de, and pairs of your own"),
    "DiaForConditionalGeneration": (TEXT_TOKEN, "nari-labs/Dia-1.6B-0626"),
    "MusicgenForConditionalGeneration": (TEXT_TOKEN, "facebook/musicgen-small"),
    "WhisperForConditionalGeneration": (FRAME, "openai/whisper-large-v3, distil-whisper/distil-large-v3"),
    "MoonshineForConditionalGeneration": (FRAME, "UsefulSensors/moonshine-base"),
    "MoonshineStreamingForConditionalGeneration": (FRAME, "UsefulSensors/moonshine-streaming-tiny"),
    "Speech2TextForConditionalGeneration": (FRAME, "facebook/s2t-small-librispeech-asr"),
    "CanaryForConditionalGeneration": (FRAME, "nvidia/canary-1b-v2"),
    "CohereAsrForConditionalGeneration": (FRAME, "CohereLabs/cohere-transcribe-03-2026"),
    "SeamlessM4TForTextToText": (TEXT_TOKEN, "facebook/hf-seamless-m4t-medium"),
    "SeamlessM4TForSpeechToText": (FRAME, "facebook/hf-seamless-m4t-medium"),
    "SeamlessM4Tv2ForTextToText": (TEXT_TOKEN, "facebook/seamless-m4t-v2-large"),
    "SeamlessM4Tv2ForSpeechToText": (FRAME, "facebook/seamless-m4t-v2-large"),
    "Pop2PianoForConditionalGeneration": (FRAME + "; the first is the composer", "sweetcocoa/pop2piano"),
    "SpeechEncoderDecoderModel": (FRAME, "facebook/wav2vec2-xls-r-300m-en-to-15"),
    "VisionEncoderDecoderModel": (
        PATCH,
        "microsoft/trocr-base-printed, naver-clova-ix/donut-base, facebook/nougat-base",
    ),
    "Florence2ForConditionalGeneration": (PATCH + ", then text token", "florence-community/Florence-2-base"),
    "Pix2StructForConditionalGeneration": (
        "image patch",
        "google/pix2struct-base, google/deplot, google/matcha-base",
    ),
    "UdopForConditionalGeneration": ("text token, then image patch", "microsoft/udop-large"),
    "PPFormulaNetForConditionalGeneration": (PATCH, "PaddlePaddle/PP-FormulaNet_plus-L_safetensors"),
    "BlipForConditionalGeneration": (PATCH, "Salesforce/blip-image-captioning-base"),
    "MllamaForConditionalGeneration": (
        "image patch of a tile, or the tile's class token",
        "meta-llama/Llama-3.2-11B-Vision-Instruct",
    ),
}
"""By class: what one encoder column is, and what is published."""

NOTES: Mapping[str, str] = {
    "LEDForConditionalGeneration": "One mask for all heads, see [quirks](#quirks).",
    "MvpForConditionalGeneration": "One mask for all heads, see [quirks](#quirks).",
    "T5GemmaForConditionalGeneration": "Policies see attention without the cap on its logits.",
    "EncoderDecoderModel": "For decoders, see [below](#pairs).",
    "SpeechEncoderDecoderModel": "For decoders, see [below](#pairs).",
    "VisionEncoderDecoderModel": "For decoders, see [below](#pairs). SDPA with mBART (Donut, Nougat) and "
    "GPT-2, but not with TrOCR.",
    "CohereAsrForConditionalGeneration": "A guide would project encoder states twice, so none is taken.",
    "MoonshineStreamingForConditionalGeneration": "A guide would add positions to encoder "
    "states twice, so none is taken.",
    "MusicgenForConditionalGeneration": "Run with classifier-free guidance, its default: half of the samples "
    "see no column. Its decoder alone is compared with SDPA, too.",
    **dict.fromkeys(
        (
            "BlipForConditionalGeneration",
            "DiaForConditionalGeneration",
            "ProphetNetForConditionalGeneration",
            "UdopForConditionalGeneration",
        ),
        "`reread=True` is refused.",
    ),
    "MllamaForConditionalGeneration": "[Supported](supported.md) says more of it, and of BART and Whisper.",
}

QUIRKS = """## Quirks

One mechanism finds and hooks the cross-attention of all classes but Llama-3.2-Vision. What else a class of
transformers needs is here.

* **One mask for all heads.** The attention of LED, MVP and TrOCR raises unless its mask is `[B, 1, T, K]`.
  If heads keep different tokens, it gets a tensor of that size that adds each head's own mask to the logits
  (`kvprune/adapters/one_mask.py`). This compiles and casts, and works with beams, static caches and half
  precision. It is refused where gradients flow into the mask itself, which merged tokens cause.
* **A mask for each head.** ProphetNet wants a mask of all heads even where they agree.
* **Relative positions.** T5 and its kin pass the position bias of one cross-attention layer to the next, as
  wide as what that layer holds; each layer gets its own.
* **No factor.** ProphetNet, BLIP and some decoders of pairs divide by the square root of the head width
  without naming it: `scaled_by_width` in the declaration.
* **A softcap.** T5Gemma can cap logits. Policies see attention without the cap, and the report warns.
* **Codebooks.** The decoder of MusicGen reads a row of tokens for each codebook; kvprune counts one row for
  each sample.
* **No cache of its own.** The decoder of Dia makes no cache if it gets none.
* **A part that generates.** BLIP generates with its text decoder, not with the whole model.
* **Encoder states that the decoder changes.** Cohere ASR projects them, and Moonshine Streaming adds
  positions, so they cannot be given to a guide.
* **Windows.** Whisper reads long recordings window by window, detects languages, and times words by
  attention weights: [speech](compare.md#speech), `kvprune/adapters/families/whisper.py`.
"""


def rows() -> Iterator[tuple[type[ModelAdapter], str, list[str]]]:
    """Yield each adapter, each class that generates, and the classes that are the same without a head."""
    for adapter in (*FAMILIES, MllamaAdapter):
        for name in adapter.model_classes:
            if name in CHECKPOINTS:
                stem = name.removesuffix("ForConditionalGeneration").removesuffix("MTModel")
                bare = [other for other in adapter.model_classes if other == f"{stem}Model" != name]
                yield adapter, name, bare


def verified(name: str) -> str:
    """Say in which settings a class is compared; for Mllama, in which its own tests run."""
    if name == "MllamaForConditionalGeneration":
        return "greedy, beams; sdpa, eager; padding"
    tiny = TINY_FAMILIES[name]
    decoding = "greedy, beams" if tiny.beams else "greedy"
    attention = "sdpa, eager" if tiny.sdpa else "eager"
    return f"{decoding}; {attention}{'; padding' * tiny.pads}"


def refused_policies(adapter: type[ModelAdapter]) -> set[str]:
    """Return the built-in policies that need something that an adapter does not provide."""
    return {
        name
        for name, entry in load().policies.items()
        if entry.plugin == "builtin" and entry.cls().needs - adapter.provides
    }


def render() -> str:
    """Return docs/models.md."""
    common = set.intersection(*map(refused_policies, FAMILIES))
    named = ", ".join(f"`{name}`" for name in sorted(common))
    lines = [HEAD.format(version=transformers.__version__, common=named)]
    for group, modules in GROUPS.items():
        lines += [
            f"## {group}",
            "",
            "| class | published | adapter | one encoder column | verified | refuses | note |",
            "|---|---|---|---|---|---|---|",
        ]
        for adapter, name, bare in rows():
            if adapter.__module__ in modules:
                column, published = CHECKPOINTS[name]
                refuses = ", ".join(f"`{one}`" for one in sorted(refused_policies(adapter) - common))
                classes = ", ".join(f"`{one}`" for one in (name, *bare))
                cells = (
                    classes,
                    published,
                    adapter.family,
                    column,
                    verified(name),
                    refuses,
                    NOTES.get(name, ""),
                )
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += [QUIRKS, *pairs(), *refused()]
    return "\n".join(lines)


def pairs() -> Iterator[str]:
    """Yield what is known of the decoders of an ``EncoderDecoderModel`` and its kin."""
    named = {name.partition(" of ")[2] for name in (*PAIRS, *TINY_FAMILIES)} - {""}
    decoders = ", ".join(
        sorted({"Bert", *(name.replace("-", "").replace("mBART", "MBart") for name in named)})
    )
    yield "## Pairs"
    yield ""
    yield (
        "`EncoderDecoderModel`, `SpeechEncoderDecoderModel` and `VisionEncoderDecoderModel` join an encoder "
        "and a decoder of your choice. These decoders are compared as above, by the name of their config: "
        f"{decoders}. With these, transformers itself cannot generate:"
    )
    yield ""
    for name, reason in STOCK_FAILS.items():
        yield f"* {name}: {reason}."
    yield ""


def refused_classes() -> dict[str, list[str]]:
    """Return the classes that are refused by the reason: those of this transformers that one might expect."""
    supported = {name for adapter in FAMILIES for name in adapter.model_classes}
    leading = {name for users in caching_classes().values() for name in users}
    others = {name for name in dir(transformers) if name.startswith(("Rag", "Idefics"))}
    found = defaultdict(list)
    for name in sorted(leading | others):
        reason = why_refused(type(name, (), {})())
        if name not in supported and reason:
            found[reason].append(name)
    return found


def refused() -> Iterator[str]:
    """Yield the table of classes that are refused."""
    found = refused_classes()
    yield "## Refused"
    yield ""
    yield (
        "Each of these raises `UnsupportedModelError` with the reason when `kvprune.compress` is called. "
        "The table has every public class of transformers that builds an `EncoderDecoderCache`, or uses one "
        "that does, and some that read pictures or documents without one."
    )
    yield ""
    yield "| class | reason |"
    yield "|---|---|"
    for group in REFUSED:
        classes = ", ".join(f"`{name}`" for name in found[group.reason])
        yield f"| {classes} | {group.reason} |"
    yield ""


if __name__ == "__main__":
    DOCUMENT.write_text(render(), encoding="utf-8")
