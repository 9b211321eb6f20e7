"""How a model reconstructs what its encoder has read, for policies that need "reconstruction"."""

from __future__ import annotations

from dataclasses import dataclass

from kvprune.errors import PolicyOptionError
from kvprune.text import shown

__all__ = ["Reconstruction"]

_LARGEST_ID = 2**31 - 1


@dataclass(frozen=True)
class Reconstruction:
    """Which text of the encoder's input the decoder reads to show which encoder tokens it needs.

    A text encoder's own tokens are that text. For pictures and recordings there is none, so the model writes
    one, greedily, with the full cache. In both cases the decoder's prompt in the target's call plays no part.

    Args:
        prompt_ids: Token ids of the prompt after which the text follows. Without any, the decoder starts as
            the model's config says.
        max_new_tokens: Most tokens to write, 1 or more; a text encoder's own tokens are never cut.

    Raises:
        PolicyOptionError: If a value has the wrong type or is out of range.
    """

    prompt_ids: tuple[int, ...] = ()
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        for token in self.prompt_ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= _LARGEST_ID:
                raise PolicyOptionError(f"prompt_ids are token ids, 0 or more, got {shown(token)}")
        limit = self.max_new_tokens
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise PolicyOptionError(
                f"max_new_tokens of a reconstruction is a whole number, 1 or more, got {shown(limit)}"
            )

    @classmethod
    def parse(cls, prompt_ids: str, max_new_tokens: int) -> Reconstruction:
        """Read the ids from text, as the option of a policy has them.

        Args:
            prompt_ids: Token ids with spaces between them, such as "128000 75885 279 2217".
            max_new_tokens: As above.

        Raises:
            PolicyOptionError: If the text has anything but such ids.

        Example:
            >>> Reconstruction.parse("5 17", 32)
            Reconstruction(prompt_ids=(5, 17), max_new_tokens=32)
        """
        words = prompt_ids.split()
        wrong = [word for word in words if not (word.isascii() and word.isdigit() and len(word) < 11)]
        if wrong:
            raise PolicyOptionError(
                "prompt_ids are token ids with spaces between them, such as '5 17' "
                f"(tokenizer(text).input_ids makes them of text), got {shown(wrong[0])}"
            )
        return cls(tuple(map(int, words)), max_new_tokens)
