"""Tiny encoder-decoders of BERT and each decoder of transformers that can attend to encoder states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvprune.adapters.tiny.family import BART, BERT, TOKENS, TinyFamily, pair_of, texts

_BERT = dict(BERT, is_decoder=True)
_BART = dict(BART, encoder_layers=2, is_decoder=True, add_cross_attention=True)
_TROCR = {
    "vocab_size": 64,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}
_XGLM = {
    "vocab_size": 64,
    "d_model": 32,
    "num_layers": 2,
    "attention_heads": 4,
    "ffn_dim": 64,
    "max_position_embeddings": 64,
}
_PROPHETNET = {
    **TOKENS,
    "hidden_size": 32,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "is_decoder": True,
    "add_cross_attention": True,
}


def _pair(decoder: str, options: Mapping[str, Any], sdpa: bool = True) -> TinyFamily:
    return TinyFamily(pair_of("EncoderDecoderConfig", ("Bert", BERT), (decoder, options)), texts, sdpa=sdpa)


PAIRS: Mapping[str, TinyFamily] = {
    "EncoderDecoderModel of BertGeneration": _pair("BertGeneration", _BERT),
    "EncoderDecoderModel of Camembert": _pair("Camembert", _BERT),
    "EncoderDecoderModel of Data2VecText": _pair("Data2VecText", _BERT),
    "EncoderDecoderModel of Electra": _pair("Electra", dict(_BERT, embedding_size=32)),
    "EncoderDecoderModel of Ernie": _pair("Ernie", _BERT),
    "EncoderDecoderModel of RemBert": _pair(
        "RemBert", dict(_BERT, input_embedding_size=32, output_embedding_size=32), sdpa=False
    ),
    "EncoderDecoderModel of Roberta": _pair("Roberta", _BERT),
    "EncoderDecoderModel of RobertaPreLayerNorm": _pair("RobertaPreLayerNorm", _BERT),
    "EncoderDecoderModel of RoCBert": _pair(
        "RoCBert", dict(_BERT, enable_pronunciation=False, enable_shape=False, concat_input=False)
    ),
    "EncoderDecoderModel of RoFormer": _pair("RoFormer", dict(_BERT, embedding_size=32), sdpa=False),
    "EncoderDecoderModel of XLMRoberta": _pair("XLMRoberta", _BERT),
    "EncoderDecoderModel of XLMRobertaXL": _pair("XLMRobertaXL", _BERT),
    "EncoderDecoderModel of Xmod": _pair("Xmod", dict(_BERT, languages=["en_XX"], default_language="en_XX")),
    "EncoderDecoderModel of TrOCR": _pair("TrOCR", _TROCR, sdpa=False),
    "EncoderDecoderModel of XGLM": _pair("XGLM", _XGLM, sdpa=False),
    "EncoderDecoderModel of ProphetNet": _pair("ProphetNet", _PROPHETNET, sdpa=False),
    "EncoderDecoderModel of Bart": _pair("Bart", _BART),
    "EncoderDecoderModel of Blenderbot": _pair("Blenderbot", _BART),
    "EncoderDecoderModel of BlenderbotSmall": _pair("BlenderbotSmall", _BART),
    "EncoderDecoderModel of BigBirdPegasus": _pair("BigBirdPegasus", _BART, sdpa=False),
    "EncoderDecoderModel of Marian": _pair("Marian", dict(_BART, decoder_vocab_size=64)),
    "EncoderDecoderModel of MBart": _pair("MBart", _BART),
    "EncoderDecoderModel of Mvp": _pair("Mvp", _BART, sdpa=False),
    "EncoderDecoderModel of Pegasus": _pair("Pegasus", _BART),
    "EncoderDecoderModel of PLBart": _pair("PLBart", _BART),
}
"""By the name of the class and of the decoder."""

STOCK_FAILS = {
    "MegatronBert": "its cross-attention does not split the cached keys by head",
    "GPTBigCode": "it has no cross-attention of several queries for one key",
    "BigBird": "it does not know the cache that `generate` makes for encoder states",
    "Tapas": "it has no language-model head",
}
"""Decoders with cross-attention with which transformers itself cannot generate, and why."""
