"""Where the encoder columns of families that read pictures lie.

Pictures may have any size, so the grid is read off what the encoder was given inside the block. States that
come from elsewhere (``encoder_outputs=``) have an unknown layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvprune.adapters.encoder_decoder import EncoderDecoderAdapter
from kvprune.engine.manager import CrossKVManager
from kvprune.tokens.layout import ENCODER_TOKEN, IMAGE_PATCH, TEXT_TOKEN, Layout

__all__ = ["Florence2Columns", "PageColumns", "PictureColumns", "UdopColumns", "known_grid"]

_ELSEWHERE = (
    "these encoder states were not computed inside the block; pass what the encoder reads, such as "
    "pixel_values, instead of encoder_outputs"
)


class PictureColumns(EncoderDecoderAdapter):
    """A family whose encoder columns are the patches of one picture, in reading order."""

    unit = IMAGE_PATCH
    provides = EncoderDecoderAdapter.provides | {"grid"}

    def grid_of(self, height: int, width: int, device: torch.device) -> Layout | None:
        """Return the layout of a picture; None if the encoder is not known.

        Args:
            height: In pixels, as the encoder receives it.
            width: Likewise.
            device: Device of the layout.
        """
        return known_grid(getattr(self.encoder, "config", None), height, width, device)

    def note(self, named: Mapping[str, Any]) -> Any:
        """Return height and width of the pictures."""
        pixels = named.get("pixel_values")
        return None if pixels is None else tuple(pixels.shape[-2:])

    def layout(self, states: Tensor) -> Layout:
        """Return the grid of the pictures that the encoder has read."""
        noted = self.notes.of(states)
        if noted is None:
            return self.unknown_layout(states, _ELSEWHERE)
        height, width = noted[0]
        layout = self.grid_of(height, width, states.device)
        if layout is None or layout.places.shape[1] != states.shape[1]:
            kind = type(self.encoder).__name__
            return self.unknown_layout(
                states,
                f"how {kind} arranges {states.shape[1]} columns of {height} x {width} pixels is unknown",
            )
        return layout


def known_grid(config: Any, height: int, width: int, device: torch.device) -> Layout | None:
    """Return the layout of a picture that one of the usual vision encoders reads; None for others.

    Args:
        config: The config of the encoder; its ``model_type`` says how it cuts pictures. None if it has none.
        height: In pixels.
        width: In pixels.
        device: Device of the layout.
    """
    arrange = _ENCODERS.get(getattr(config, "model_type", ""))
    if arrange is None:
        return None
    size = config.patch_size
    patch = (size, size) if isinstance(size, int) else tuple(size)
    return arrange(config, (height, width), patch, device)


_Arrange = Callable[[Any, tuple[int, int], tuple[int, int], torch.device], Layout]


def _flat(class_tokens: int) -> _Arrange:
    """Return the arrangement of an encoder whose patches keep their size from first layer to last."""

    def arrange(config: Any, pixels: tuple[int, int], patch: tuple[int, int], device: torch.device) -> Layout:
        rows, across = (side // step for side, step in zip(pixels, patch, strict=True))
        others = getattr(config, "num_register_tokens", 0)
        return Layout.grid(rows, across, device, class_tokens=class_tokens, others=others)

    return arrange


def _merging(config: Any, pixels: tuple[int, int], patch: tuple[int, int], device: torch.device) -> Layout:
    """Arrange the patches of an encoder that joins four patches after each stage but the last."""
    rows, across = (-(-side // step) for side, step in zip(pixels, patch, strict=True))
    for _ in config.depths[1:]:
        rows, across = -(-rows // 2), -(-across // 2)
    return Layout.grid(rows, across, device)


_ENCODERS: Mapping[str, _Arrange] = {
    "vit": _flat(1),
    "deit": _flat(2),  # the second one is for distillation
    "beit": _flat(1),
    "data2vec-vision": _flat(1),
    "dinov2": _flat(1),
    "dinov2_with_registers": _flat(1),
    "blip_vision_model": _flat(1),
    "clip_vision_model": _flat(1),
    "siglip_vision_model": _flat(0),
    "swin": _merging,
    "swinv2": _merging,
    "donut-swin": _merging,
}
"""How vision encoders arrange their columns, by the ``model_type`` of their config."""


class PageColumns(EncoderDecoderAdapter):
    """A family whose encoder reads patches that say their row and column themselves, counted from 1."""

    unit = IMAGE_PATCH
    provides = EncoderDecoderAdapter.provides | {"grid"}

    def note(self, named: Mapping[str, Any]) -> Any:
        """Return row and column of each patch, ``[N, S, 2]``."""
        patches = named.get("flattened_patches")
        return None if patches is None else patches[..., :2].long()

    def layout(self, states: Tensor) -> Layout:
        """Return the grid of each page; padding has row 0."""
        noted = self.notes.of(states)
        if noted is None:
            return self.unknown_layout(states, _ELSEWHERE)
        told, times = noted
        places = (told.to(states.device) - 1).repeat_interleave(times, 0)  # [R, S, 2]
        nowhere = (places < 0).any(-1, keepdim=True)
        return Layout(places.masked_fill(nowhere, -1), units=(IMAGE_PATCH,))


class UdopColumns(EncoderDecoderAdapter):
    """UDOP: words with boxes, then the patches that no word has taken, then padding.

    The encoder adds to each word the patch in which the centre of its box lies, so this is the word's place.
    """

    provides = EncoderDecoderAdapter.provides | {"grid"}

    def note(self, named: Mapping[str, Any]) -> Any:
        """Return the patch of each word and whether it has a box, int64 and bool ``[N, words]``."""
        boxes = named.get("bbox")
        if boxes is None or named.get("visual_bbox") is not None:
            return None
        side = self._side
        across, down = (  # [N, words], in patches, computed as the encoder does
            ((boxes[..., low] + boxes[..., low + 2]) / 2.0 * side).floor().long().clamp(0, side - 1)
            for low in (0, 1)
        )
        middle = boxes.double().mean(-1)
        pictures = named.get("pixel_values") is not None or named.get("image_embeddings") is not None
        return down * side + across, (middle != 0) & (middle != 1), pictures

    def layout(self, states: Tensor) -> Layout:
        """Return where words and patches lie on each page."""
        noted = self.notes.of(states)
        if noted is None:
            return self.unknown_layout(states, _ELSEWHERE)
        (taken, boxed, pictures), times = noted
        taken, boxed = taken.to(states.device), boxed.to(states.device)
        patches = torch.where(boxed, taken, -1)  # [N, words], number of the patch
        if pictures:
            patches = torch.cat([patches, _left(taken, self._side**2)], dim=-1)  # [N, S]
        patches = patches.repeat_interleave(times, 0)  # [R, S]
        places = torch.stack([patches // self._side, patches % self._side], dim=-1)
        places = places.masked_fill(patches[..., None] < 0, -1)
        if places.shape[1] != states.shape[1]:
            return self.unknown_layout(states, "the encoder has made other columns than words and patches")
        if not pictures:
            return Layout(places, units=(TEXT_TOKEN,))
        is_patch = torch.arange(states.shape[1], device=states.device)[None] >= taken.shape[1]
        return Layout(places, units=(TEXT_TOKEN, IMAGE_PATCH), kinds=is_patch.long())

    @property
    def _side(self) -> int:
        config: Any = self.model.config
        return int(config.image_size // config.patch_size)


def _left(taken: Tensor, patches: int) -> Tensor:
    """Return the patches that are not taken, in order, int64 ``[N, patches]``; then -1 for the others."""
    numbers = torch.arange(patches, device=taken.device).expand(len(taken), -1)
    free = torch.ones_like(numbers).scatter_(1, taken, 0)  # [N, patches]
    order = free.argsort(dim=1, descending=True, stable=True)
    return torch.where(free.gather(1, order) == 1, order, -1)


class Florence2Columns(EncoderDecoderAdapter):
    """Florence-2: the mean of a picture and its patches, where the prompt has image tokens; then text."""

    unit = ENCODER_TOKEN  # its encoder says only that it reads tokens
    provides = EncoderDecoderAdapter.provides | {"grid"}

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._shown: Tensor | None = None  # bool [N, S], the image tokens of a prompt that is being encoded
        self._size: tuple[int, int] | None = None  # rows and columns of its picture

    def attach(self, manager: CrossKVManager) -> None:
        """Add the hooks of the family, and note where pictures enter a prompt."""
        super().attach(manager)
        inner = self.model if hasattr(self.model, "vision_tower") else self.model.get_submodule("model")
        self.after(inner.get_submodule("vision_tower"), self._note_picture)
        self.around(inner, "get_placeholder_mask", self._note_mask)

    def detach(self) -> None:
        """Undo `attach`, and forget the picture."""
        super().detach()
        self._shown = self._size = None

    def note(self, named: Mapping[str, Any]) -> Any:
        """Return where the picture stands in the prompt, and its rows and columns."""
        shown, size = self._shown, self._size
        self._shown = self._size = None
        return shown, size

    def layout(self, states: Tensor) -> Layout:
        """Return the grid of the picture; the text has no place in it."""
        noted = self.notes.of(states)
        if noted is None:
            return self.unknown_layout(states, _ELSEWHERE)
        (shown, size), times = noted
        if shown is None and size is None:
            return Layout.line(states.shape[1], states.device, unit=TEXT_TOKEN)
        if shown is None or size is None:
            return self.unknown_layout(states, "it is not known where the picture stands in the prompt")
        rows, across = size
        shown = shown.to(states.device).repeat_interleave(times, 0)  # [R, S]
        if not bool((shown.sum(-1) == rows * across + 1).all()):
            return self.unknown_layout(states, "a prompt has another number of image tokens than one picture")
        patch = torch.where(shown, shown.cumsum(-1) - 2, -1)[..., None]  # the first is the picture's mean
        places = torch.cat([patch // across, patch % across], dim=-1).masked_fill(patch < 0, -1)
        return Layout(places, units=(IMAGE_PATCH, TEXT_TOKEN), kinds=(~shown).long())

    def _note_picture(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._size = tuple(output[0].shape[-2:])

    def _note_mask(self, method: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        mask = method(*args, **kwargs)  # [N, S, 1]
        self._shown = mask[..., 0]
        return mask
