"""Measures recall on reference pages during training, without generating text.

Greedy decoding gives the right answer exactly if every token of the answer is the likeliest one after the right tokens
before it. So one forward pass over prompt and answer is enough. ``jrt eval`` measures the same items by generation.
"""

import logging
import math

import torch
from jrt_recall import prompts, reference_pages
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from jrt.model import LanguageModel
from jrt.training.objective import greedy_answers

log = logging.getLogger(__name__)
TOKENS_A_PASS = 65_536


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def score(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: tuple[int, ...] = (256, 512, 1024, 2048),
    strategies: tuple[str, ...] = ("once", "twice", "question_first"),
    count: int = 256,
) -> list[dict]:
    """Asks the model questions on reference pages of the running Python's standard library.

    Args:
        model: in any precision, on any device.
        tokenizer: the model's.
        windows: sizes of the pages, in tokens.
        strategies: how each page is read, as in `jrt_recall.prompts`.
        count: questions for each window and strategy.

    Returns:
        One record for each window and strategy: window, strategy, right (number of right answers), n (number of
            questions)
        and score (percent right).
    """
    device = next(model.parameters()).device
    records = []
    for window in windows:
        documents = reference_pages.select(window, tokenizer, count).documents
        for strategy in strategies:
            pairs = [_encoded(tokenizer, document, strategy) for document in documents]
            longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
            rows = max(1, TOKENS_A_PASS // longest)
            parts = range(0, len(pairs), rows)
            found = [
                _right(model, pairs[i : i + rows], tokenizer, device)
                for i in tqdm(parts, desc=f"{window} {strategy}", leave=False, disable=None)
            ]
            right = sum(found)
            records.append(
                {
                    "window": window,
                    "strategy": strategy,
                    "right": right,
                    "n": len(pairs),
                    "score": 100 * right / len(pairs),
                }
            )
            log.info("window %d %s: %.1f of 100 (%d items)", window, strategy, records[-1]["score"], len(pairs))
    return records


def _encoded(tokenizer: PreTrainedTokenizerBase, document: dict, strategy: str) -> tuple[list[int], list[int]]:
    texts = [prompts.prompt("reference_pages", document, strategy), document["arguments"] + ")"]
    asked, answer = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return asked, answer


def _right(
    model: LanguageModel,
    pairs: list[tuple[list[int], list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> int:
    """Returns how many of these (prompt, answer) pairs are right.

    Rows are padded at the end, after all that is scored."""
    length = 64 * math.ceil(max(len(prompt) + len(answer) for prompt, answer in pairs) / 64)
    padding = tokenizer.pad_token_id or 0
    ids = torch.full((len(pairs), length), padding)
    answers = torch.zeros((len(pairs), length), dtype=torch.long)
    for row, (prompt, answer) in enumerate(pairs):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        answers[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = 1  # where the answer's tokens are predicted
    prefix = torch.tensor([len(prompt) for prompt, _ in pairs])
    likeliest = model(ids.to(device), prefix_length=prefix.to(device)).argmax(-1).cpu()  # (R, T)
    correct, _ = greedy_answers(likeliest, ids.roll(-1, dims=1), answers)
    return int(correct)
