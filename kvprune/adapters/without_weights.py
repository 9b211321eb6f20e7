"""Builds the model of a checkpoint without its weights, from its config.json alone.

The model is built on the meta device, which holds shapes and no numbers: any model takes moments and no
memory. Nothing is downloaded, and code that comes with a checkpoint is not run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvprune.errors import UnsupportedModelError
from kvprune.text import error_line, printable, shown

__all__ = ["model_without_weights"]


def model_without_weights(name: str) -> tuple[Path, Any]:
    """Return the folder of a checkpoint, and its model in eval mode on the meta device.

    Args:
        name: A folder with a config.json, or the name of a checkpoint in the local cache of the Hub.

    Raises:
        UnsupportedModelError: If there is no config, or no class of transformers can be built from it.
    """
    folder = _folder(name)
    return folder, _build(folder, _read(folder / "config.json"))


def _folder(name: str) -> Path:
    """Return the folder with the config.json of a checkpoint."""
    folder = Path(name)
    if folder.is_file() and folder.name == "config.json":
        folder = folder.parent
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return folder
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = "; it is an adapter of peft, so name the folder of its base model"
        raise UnsupportedModelError(f"folder {name} holds no config.json, but {printable(found, 300)}{hint}")
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        raise UnsupportedModelError(f"there is no folder {shown(name)}") from None
    if not isinstance(cached, str):
        raise UnsupportedModelError(
            f"there is no folder {shown(name)}, and no checkpoint of that name in the local cache of the "
            f"Hub; nothing is downloaded here, so fetch it first: hf download {name} config.json"
        )
    return Path(cached).parent


def _read(path: Path) -> dict[str, Any]:
    """Return the contents of a config.json, with the type of the model and the names of its classes."""
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModelError(f"{path} cannot be read as JSON: {error_line(error)}") from None
    if not isinstance(settings, dict):
        raise UnsupportedModelError(f"{path} holds {shown(settings, 80)}, expected a JSON object")
    kind, names = settings.get("model_type"), settings.get("architectures")
    if not isinstance(kind, str) or not kind:
        raise UnsupportedModelError(
            f"{path} has the model_type {shown(kind)}, expected the name of a family of transformers"
        )
    if not isinstance(names, list) or not names or not all(isinstance(one, str) for one in names):
        raise UnsupportedModelError(
            f"{path} has the architectures {shown(names)}, expected the name of the model's class, such as "
            f'["BartForConditionalGeneration"]; model.save_pretrained writes it'
        )
    return settings


def _build(folder: Path, settings: dict[str, Any]) -> Any:
    """Build the model without weights."""
    import torch
    import transformers

    kind, names = settings["model_type"], settings["architectures"]
    version = f"transformers {transformers.__version__}"
    own = " It comes with code of its own, which is never run here." if "auto_map" in settings else ""
    if kind not in transformers.CONFIG_MAPPING:
        raise UnsupportedModelError(f"{version} knows no model_type {shown(kind)}.{own}")
    cls = next((cls for name in names if (cls := getattr(transformers, name, None)) is not None), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise UnsupportedModelError(f"{version} has no model class {shown(', '.join(names))}.{own}")
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            return cls(config).eval()
    except Exception as error:  # whatever a config can break
        raise UnsupportedModelError(
            f"{cls.__name__} cannot be built from {folder / 'config.json'}: {error_line(error)}"
        ) from error
