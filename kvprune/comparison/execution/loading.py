"""Loads a model and its processor without running code that comes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

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
    "AutoModelForImageTextToText.from_pretrained({model!r}).save_pretrained('converted'), "
    "and copy the processor's files beside it"
)


def load_model(
    model: str | None,
    *,
    device: str,
    dtype: str,
    attn_implementation: str | None,
    trust_remote_code: bool,
) -> tuple[Any, Any]:
    """Return a model and its processor.

    Args:
        model: Hub id or local folder; None is the embedded demo.
        device: A torch device.
        dtype: ``auto``, or the name of a torch dtype.
        attn_implementation: Passed to transformers; None is its default.
        trust_remote_code: Let transformers run Python files that come with the model.

    Raises:
        UnsupportedModelError: If the model cannot be loaded, names code of its own, or has no safetensors.
    """
    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        if model is None:
            return _load_demo(device, dtype, attn_implementation)
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if not trust_remote_code:
            _refuse_code(model)
        _refuse_pickles(model)
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=trust_remote_code)
        loaded = AutoModelForImageTextToText.from_pretrained(
            model,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            **extra,
        )
        return cast("torch.nn.Module", loaded).to(device), processor
    except UnsupportedModelError:
        raise
    except Exception as error:  # transformers raises errors of many classes for a broken checkpoint
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "safetensors" in reason and "no file named" in reason:
            reason += "; " + _CONVERT.format(model=model)
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


def _refuse_pickles(model: str) -> None:
    """Raise if a local folder has weights, but none of them in safetensors."""
    folder = Path(model)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        raise UnsupportedModelError(
            f"cannot load model {model!r}: it has {pickles[0]} but no *.safetensors; "
            + _CONVERT.format(model=model)
        )
