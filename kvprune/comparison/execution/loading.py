"""Loads a model and its processor without running code that comes with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from kvprune.comparison.data.examples import Kind
from kvprune.comparison.data.safe_json import parse
from kvprune.errors import UnsupportedModelError

__all__ = ["load_model"]

_CONFIGS = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "image_processor_config.json",
    "tokenizer_config.json",
)
"""Files that may name Python code for transformers to run."""

_CONVERT = (
    "weights in *.bin or *.pt files are pickles, which can run code when they are read, so kvprune reads "
    "safetensors only; convert once, where you trust the files: "
    "{auto}.from_pretrained({model!r}).save_pretrained('converted'), "
    "and copy the processor's files beside it"
)


_AUTO: Mapping[Kind, str] = {"pictures": "AutoModelForImageTextToText", "speech": "AutoModelForSpeechSeq2Seq"}
"""Classes of transformers that load a model of each kind."""

_NEEDED: Mapping[Kind, str] = {
    "pictures": "questions about pictures need a model of pictures and text, such as Llama-3.2-Vision",
    "speech": "recordings need a model that transcribes speech, such as Whisper",
}

_WITHOUT_HUB = (
    "; the demo of speech needs Whisper base (about 290 MB): run once where the model hub can be reached, so "
    "that transformers keeps it on this machine, or give a folder that holds it with --model FOLDER "
    "(Settings.model)"
)


def load_model(
    model: str | None,
    kind: Kind,
    *,
    device: str,
    dtype: str,
    attn_implementation: str | None,
    trust_remote_code: bool,
) -> tuple[Any, Any]:
    """Return a model and its processor.

    Args:
        model: Hub id or local folder; None is the model of the demo.
        kind: What the model is asked.
        device: A torch device.
        dtype: ``auto``, or the name of a torch dtype. ``auto`` is the dtype of the checkpoint, but float32
            instead of float16 on a CPU, which computes float16 slowly and less exactly.
        attn_implementation: Passed to transformers; None is its default.
        trust_remote_code: Let transformers run Python files that come with the model.

    Raises:
        UnsupportedModelError: If the model cannot be loaded, names code of its own, or has no safetensors.
    """
    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        if model is None and kind == "pictures":
            return _load_demo(device, dtype, attn_implementation)
        import transformers

        model, auto = model or _speech_demo(), getattr(transformers, _AUTO[kind])
        if not trust_remote_code:
            _refuse_code(model)
        _refuse_pickles(model, kind)
        _refuse_other_kinds(model, kind, trust_remote_code=trust_remote_code)
        processor = transformers.AutoProcessor.from_pretrained(model, trust_remote_code=trust_remote_code)
        loaded = auto.from_pretrained(
            model,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            **extra,
        )
        if dtype == "auto" and torch.device(device).type == "cpu" and loaded.dtype == torch.float16:
            loaded = loaded.float()
        return cast("torch.nn.Module", loaded).to(device), processor
    except UnsupportedModelError:
        raise
    except Exception as error:  # transformers raises errors of many classes for a broken checkpoint
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "safetensors" in reason and "no file named" in reason:
            reason += "; " + _CONVERT.format(model=model, auto=_AUTO[kind])
        if kind == "speech" and model == _speech_demo():
            reason += _WITHOUT_HUB
        raise UnsupportedModelError(f"cannot load model {model!r} on {device!r}: {reason}") from error


def _load_demo(device: str, dtype: str, attn_implementation: str | None) -> tuple[Any, Any]:
    from kvprune import demo

    return demo.load(
        dtype=torch.float32 if dtype == "auto" else getattr(torch, dtype),
        attn_implementation=attn_implementation or "sdpa",
        device=device,
    )


def _refuse_code(model: str) -> None:
    """Raise if a checkpoint names code of its own, even where transformers would use its built-in class."""
    from transformers.utils.hub import cached_file

    for name in _CONFIGS:
        path = cached_file(
            model,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )
        content = parse(Path(path).read_bytes()) if path else {}
        code = content.get("auto_map") if isinstance(content, dict) else None
        if code:
            named = ", ".join(map(str, code.values())) if isinstance(code, dict) else str(code)
            raise UnsupportedModelError(
                f"model {model!r} wants to run Python code that comes with it: {name} names {named}. "
                "Read that code; if you trust it, give --trust-remote-code (Settings.trust_remote_code)"
            )


def _speech_demo() -> str:
    from kvprune import demo

    return demo.SPEECH_MODEL


def _refuse_other_kinds(model: str, kind: Kind, *, trust_remote_code: bool) -> None:
    """Raise if transformers has no class for this model that answers examples of this kind."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    if not (trust_remote_code or type(config) in getattr(transformers, _AUTO[kind])._model_mapping):
        raise UnsupportedModelError(
            f"cannot load model {model!r}: a {config.model_type} cannot be asked about {kind}; "
            f"{_NEEDED[kind]}"
        )


def _refuse_pickles(model: str, kind: Kind) -> None:
    """Raise if a local folder has weights, but none of them in safetensors."""
    folder = Path(model)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        raise UnsupportedModelError(
            f"cannot load model {model!r}: it has {pickles[0]} but no *.safetensors; "
            + _CONVERT.format(model=model, auto=_AUTO[kind])
        )
