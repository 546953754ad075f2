"""The byte-level BPE vocabulary of the mini models: 4,096 entries whose merges never cross a line end or an opening bracket.

So a text that ends in ``name(`` is encoded as the beginning of the same text with the arguments after it: what a prompt asks is
token for token what training showed.
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END, PAD, MASK = "<|endoftext|>", "<|pad|>", "<|mask|>"
VOCABULARY = 4096
# A line end; an opening bracket; a word with what leads it; up to three digits; other signs; spaces.
PIECES = r"\n| ?\(|[ _=.]?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}(]+|[^\S\n]+"


def train_tokenizer(
    texts: Iterable[str], vocabulary: int = VOCABULARY, max_length: int = 4608
) -> PreTrainedTokenizerFast:
    """END is id 0, PAD id 1, and MASK the last row, as in the released models."""
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
