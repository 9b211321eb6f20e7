"""What a view says about positions, and the refusal of policies that need positions which do not exist."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from torch import Tensor

from kvprune.errors import UnsupportedModelError
from kvprune.tokens.layout import Layout
from kvprune.tokens.visibility import Visibility

__all__ = ["Geometry", "layout_from", "require_grid", "require_places"]


class Geometry:
    """The part of a view that says what its columns are and where they lie."""

    visibility: Visibility
    policy_name: str
    layout_of: Callable[[], Layout] | None

    @property
    def images(self) -> Tensor:
        """Image of each column, int64 ``[B or 1, S]``."""
        return self.visibility.images[self.visibility.units]

    @cached_property
    def layout(self) -> Layout:
        """What each column is, and its position.

        Raises:
            UnsupportedModelError: If nothing is known.
        """
        return layout_from(self.layout_of, self.policy_name)

    @property
    def places(self) -> Tensor:
        """Row and column of each encoder token in its image, in patches, int64 ``[B or 1, S, 2]``.

        Counted over the whole image, across tiles; -1, -1 for class tokens and padding. Audio frames and text
        tokens lie on a line, in row 0; a policy that makes no sense of a line reads `grid`.

        Raises:
            UnsupportedModelError: If positions are unknown.
        """
        return require_places(self.layout, self.policy_name)

    @property
    def grid(self) -> Tensor:
        """The same as `places`, of columns that are patches of a picture.

        A policy that reads it declares ``needs = frozenset({"grid"})``. Models that have no grid are then
        refused before they compute anything.

        Raises:
            UnsupportedModelError: If the columns lie on a line, or their positions are unknown.
        """
        return require_grid(self.layout, self.policy_name)

    @property
    def class_tokens(self) -> Tensor | None:
        """Class tokens of the encoder, bool ``[B or 1, S]``; None if it has none.

        Raises:
            UnsupportedModelError: If it is unknown which columns are class tokens.
        """
        require_places(self.layout, self.policy_name)
        return self.layout.class_tokens

    @property
    def segments(self) -> Tensor:
        """Columns that follow each other within one tile and are of one kind, int64 ``[B or 1, S]``.

        Policies that pool or merge along columns stay within a segment. Equal to ``visibility.units``, the
        tiles, unless the encoder puts several kinds of columns one after the other, such as a picture and a
        text.
        """
        return self.split_by_kind(self.visibility.units)

    def split_by_kind(self, numbers: Tensor) -> Tensor:
        """Return numbers of groups, int64 ``[B or 1, S]``, with a group of its own for each kind of columns.

        The same numbers where all columns are of one kind.

        Args:
            numbers: int64 ``[B or 1, S]``, at least 0, such as `images`.
        """
        runs = None if self.layout_of is None else self.layout.runs
        if runs is None:
            return numbers
        runs = runs.to(numbers.device)
        return numbers * (runs.amax() + 1) + runs


def layout_from(layout_of: Callable[[], Layout] | None, policy_name: str) -> Layout:
    """Return a layout that an adapter computes.

    Args:
        layout_of: Computes it; None if the adapter cannot.
        policy_name: For the message.

    Raises:
        UnsupportedModelError: If it cannot.
    """
    if layout_of is None:
        raise UnsupportedModelError(
            f"policy {policy_name!r} asks where tokens lie in their image, which is unknown here; "
            "pass pixel_values and aspect_ratio_ids instead of cross_attention_states"
        )
    return layout_of()


def require_places(layout: Layout, policy_name: str) -> Tensor:
    """Return the positions of a grid or a line, int64 ``[B or 1, S, 2]``.

    Args:
        layout: Of the columns.
        policy_name: For the message.

    Raises:
        UnsupportedModelError: If they are unknown; says why.
    """
    if layout.geometry == "unknown":
        raise UnsupportedModelError(
            f"policy {policy_name!r} asks where {layout.unit.many} lie, which is unknown here"
            f"{_because(layout)}"
        )
    return layout.places


def require_grid(layout: Layout, policy_name: str) -> Tensor:
    """Return rows and columns of patches, int64 ``[B or 1, S, 2]``.

    Args:
        layout: Of the columns.
        policy_name: For the message.

    Raises:
        UnsupportedModelError: If the columns lie on a line, or their positions are unknown.
    """
    if layout.geometry == "line":
        raise UnsupportedModelError(
            f"policy {policy_name!r} needs a grid, rows and columns of a picture, but here columns are "
            f"{layout.unit.many}, which lie on a line{_because(layout)}; use an option that pools along a "
            "line, or another policy"
        )
    return require_places(layout, policy_name)


def _because(layout: Layout) -> str:
    return f": {layout.reason}" if layout.reason else ""
