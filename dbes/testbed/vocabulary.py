"""Byte-level BPE tokenizers, trained on a mix in seconds."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dbes.testbed.mix import Text

BOUNDARY, PADDING = "<|endoftext|>", "<|pad|>"


def train_tokenizer(
    texts: Mapping[str, Sequence[Text]], *, vocabulary: int, max_positions: int, bytes_per_domain: int = 500_000
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly ``vocabulary`` ids (0: document boundary, 1: padding), the same for the same texts.

    Every domain gives at most ``bytes_per_domain``, so that none owns the vocabulary; digits stay single, so that numbers are
    read the same way wherever they stand. No token is added before or after a text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOUNDARY, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(texts, bytes_per_domain), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=BOUNDARY,
        pad_token=PADDING,
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )


def _sample(texts: Mapping[str, Sequence[Text]], bytes_per_domain: int) -> Iterator[str]:
    for name in texts:
        order = list(range(len(texts[name])))
        random.Random(0).shuffle(order)
        taken = 0
        for index in order:
            if taken >= bytes_per_domain:
                break
            taken += len(texts[name][index].text.encode())
            yield texts[name][index].text
