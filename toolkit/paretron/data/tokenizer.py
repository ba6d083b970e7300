"""A byte-level BPE tokenizer trained on documents, and the identity of any tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from paretron.errors import Code, ParetronError, Problem

# Spelt so that no ordinary text holds one.
BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, folder: Path
) -> PreTrainedTokenizerFast:
    """Train on all documents and save a tokenizer that AutoTokenizer loads; the same every time.

    Every byte has a token, so any text can be written. Little text gives fewer than `vocab_size`
    tokens. bos, eos and pad are tokens 0, 1 and 2.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def tokenizer_sha256(folder: Path) -> str:
    """The hash of a folder's tokenizer.json: equal hashes give every text the same tokens."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ParetronError(
            Problem(
                Code.INPUT_TOKENIZER,
                "no tokenizer.json here",
                where=str(folder),
                fix="copy the tokenizer files beside the weights",
            )
        )
    return hashlib.sha256(path.read_bytes()).hexdigest()
