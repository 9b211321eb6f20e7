"""Tokenizers of real families, trained in a moment on the sentences of the demo of speech."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kvprune.demo.recordings import speech_data

__all__ = [
    "bart_tokenizer",
    "bert_tokenizer",
    "marian_tokenizer",
    "mbart_tokenizer",
    "nllb_tokenizer",
    "nougat_tokenizer",
    "plain_tokenizer",
    "seamless_tokenizer",
    "speech2text_tokenizer",
    "t5_tokenizer",
    "udop_tokenizer",
    "whisper_tokenizer",
]

SIZE = 150
"""Tokens that a tokenizer learns at most, its special ones included; a byte-level one has 256 more."""
SPACE = "▁"  # as SentencePiece writes a space


@functools.cache
def sentences() -> tuple[str, ...]:
    """Return what the tokenizers learn from."""
    lines = speech_data().read_text("utf-8").splitlines()
    prompts = "what is on the page ?", "a picture of a red circle", "how many bars does the picture have"
    return (*(json.loads(line)["text"] for line in lines), *prompts, "What does it show? Locate the page.")


def _trained(model: Any, trainer: Any, split: Any) -> Any:
    """Return what a model of tokens has learned, as its file says it."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = split
    tokenizer.train_from_iterator(sentences(), trainer)
    return tokenizer


def _learned(tokenizer: Any) -> dict[str, Any]:
    return json.loads(tokenizer.to_str())["model"]


def _spaces() -> Any:
    return pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)


def unigrams(*special: str, unk: str = "<unk>") -> list[tuple[str, float]]:
    """Return pieces of words with their scores, special ones first."""
    trainer = trainers.UnigramTrainer(
        vocab_size=SIZE, special_tokens=list(special), unk_token=unk, show_progress=False
    )
    learned = _learned(_trained(models.Unigram(), trainer, _spaces()))["vocab"]
    # The trainer orders equal scores anew in each process.
    pieces = sorted((piece, round(float(score), 2)) for piece, score in learned if piece not in special)
    return [*((piece, 0.0) for piece in special), *pieces]


def pairs(*special: str) -> dict[str, Any]:
    """Return pieces of words and how they merge (byte pair encoding), special ones first."""
    trainer = trainers.BpeTrainer(vocab_size=SIZE, special_tokens=list(special), show_progress=False)
    return _merges(_trained(models.BPE(unk_token="<unk>"), trainer, _spaces()))


def bytes_in_pairs(*special: str) -> dict[str, Any]:
    """Return pieces of bytes and how they merge, special ones first."""
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE + 256,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return _merges(_trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False)))


def _merges(tokenizer: Any) -> dict[str, Any]:
    learned = _learned(tokenizer)
    return {"vocab": learned["vocab"], "merges": [tuple(pair) for pair in learned["merges"]]}


# The tokenizers of families.

BART = "<s>", "<pad>", "</s>", "<unk>"


def bart_tokenizer(image_token: str = "") -> Any:
    """BART's, RoBERTa's and Florence-2's, which has a token for pictures."""
    extra = {"extra_special_tokens": {"image_token": image_token}} if image_token else {}
    return transformers.BartTokenizer(**bytes_in_pairs(*BART, "<mask>"), **extra)


def bert_tokenizer() -> Any:
    """BERT's and BLIP's."""
    words = sorted({word for text in sentences() for word in re.findall(r"\w+|[^\w\s]", text.lower())})
    letters = sorted({letter for word in words for letter in word})
    # The trainer of word pieces orders equal counts anew in each process, so words and letters are listed.
    listed = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    listed += [word for word in words if word not in letters]
    return transformers.BertTokenizer(vocab={piece: place for place, piece in enumerate(listed)})


def mbart_tokenizer(*special: str) -> Any:
    """mBART's, with tokens of a task."""
    tokenizer = transformers.XLMRobertaTokenizer(vocab=unigrams("<s>", "<pad>", "</s>", "<unk>", "<mask>"))
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def nougat_tokenizer() -> Any:
    return transformers.NougatTokenizer(**bytes_in_pairs(*BART))


def t5_tokenizer() -> Any:
    return transformers.T5Tokenizer(vocab=unigrams("<pad>", "</s>", "<unk>"), extra_ids=4)


def udop_tokenizer() -> Any:
    return transformers.UdopTokenizer(vocab=unigrams("<pad>", "</s>", "<unk>"))


def nllb_tokenizer() -> Any:
    return transformers.NllbTokenizer(**pairs(*BART), src_lang="eng_Latn", tgt_lang="fra_Latn")


def seamless_tokenizer() -> Any:
    learned = pairs("<pad>", "<unk>", "<s>", "</s>", "__eng__", "__fra__")
    languages = ["__eng__", "__fra__"]
    return transformers.SeamlessM4TTokenizer(**learned, additional_special_tokens=languages)


def whisper_tokenizer() -> Any:
    """Whisper's, with the tokens of two languages and times up to 3 seconds."""
    tokenizer = transformers.WhisperTokenizer(**bytes_in_pairs("<|endoftext|>"), pad_token="<|endoftext|>")
    names = "startoftranscript", "en", "de", "translate", "transcribe", "startoflm", "startofprev"
    special = [f"<|{name}|>" for name in (*names, "nospeech", "notimestamps")]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens([f"<|{step * 0.02:.2f}|>" for step in range(151)])
    return tokenizer


def plain_tokenizer(*more: str) -> Any:
    """A tokenizer of no family, as Moonshine has, with more tokens of a task."""
    learned = pairs("<unk>", "<s>", "</s>", "<pad>", *more)
    tokenizer = Tokenizer(models.BPE(**learned, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = _spaces()
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def marian_tokenizer() -> Any:
    """Marian's if SentencePiece is installed, else one of no family."""
    if importlib.util.find_spec("sentencepiece") is None:
        return plain_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        pieces, vocabulary = _sentencepiece(Path(folder), "</s>", "<unk>")
        return transformers.MarianTokenizer(
            source_spm=pieces, target_spm=pieces, vocab=vocabulary, source_lang="en", target_lang="fr"
        )


def speech2text_tokenizer() -> Any:
    """Speech2Text's if SentencePiece is installed, else one of no family."""
    if importlib.util.find_spec("sentencepiece") is None:
        return plain_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        pieces, vocabulary = _sentencepiece(Path(folder), "<s>", "<pad>", "</s>", "<unk>")
        return transformers.Speech2TextTokenizer(vocab_file=vocabulary, spm_file=pieces)


def _sentencepiece(folder: Path, *special: str) -> tuple[str, str]:
    """Train SentencePiece; return the files of its pieces and of their places, special ones first."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_prefix=str(folder / "pieces"),
        vocab_size=80,
        minloglevel=2,
    )
    learned = sentencepiece.SentencePieceProcessor(model_file=str(folder / "pieces.model"))
    pieces = (learned.id_to_piece(place) for place in range(learned.get_piece_size()))
    listed = [*special, *(piece for piece in pieces if piece not in special), "<pad>"]
    places = {piece: place for place, piece in enumerate(dict.fromkeys(listed))}
    (folder / "places.json").write_text(json.dumps(places), "utf-8")
    return str(folder / "pieces.model"), str(folder / "places.json")
