"""The byte-level BPE vocabulary of the mini models: 4,096 entries whose merges never cross a line end or an opening
bracket.

For this reason ``name(`` has the same tokens at the end of a prompt as in a training text that goes on with the
arguments."""

from collections.abc import Iterable

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

END, PAD, MASK = "<|endoftext|>", "<|pad|>", "<|mask|>"
VOCABULARY = 4096
# A text is first split into these pieces, which no token crosses: a line end; an opening bracket; a word with one
# blank, "_", "=" or "." in front; up to three digits; other signs; spaces.
PIECES = r"\n| ?\(|[ _=.]?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}(]+|[^\S\n]+"


def train_tokenizer(
    texts: Iterable[str], vocabulary: int = VOCABULARY, max_length: int = 4608
) -> PreTrainedTokenizerFast:
    """Learns the vocabulary from texts, and returns it as a tokenizer.

    END has id 0 and PAD id 1. MASK has the last id, as in the released models.

    Args:
        texts: training texts.
        vocabulary: number of entries, special ones included.
        max_length: longest input that the tokenizer states for the model.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([])
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 1,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([MASK])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        mask_token=MASK,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast, budget: int | None = None) -> np.ndarray:
    """Encodes texts one after the other, each followed by a line end and the end-of-text id.

    The name of a special entry inside a text is read as plain text.

    Args:
        texts: what is encoded.
        tokenizer: as `train_tokenizer` returns it.
        budget: stop after this many tokens, at the end of a block of 512 texts; None: no limit.

    Returns:
        (tokens,) uint16.
    """
    tokenizer.backend_tokenizer.encode_special_tokens = True
    arrays: list[np.ndarray] = []
    total = 0
    for start in tqdm(range(0, len(texts), 512), desc="encoding", unit="x512 documents"):
        if budget is not None and total >= budget:
            break
        lines = [text + "\n" for text in texts[start : start + 512]]
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(lines, add_special_tokens=False):
            arrays.append(np.array([*encoding.ids, tokenizer.eos_token_id], dtype=np.uint16))
            total += len(arrays[-1])
    return np.concatenate(arrays) if arrays else np.zeros(0, np.uint16)
