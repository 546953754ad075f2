"""Our models in stock lm-eval: importing this module registers `--model jrt`. Nothing in lm-eval is changed.

lm-eval does not discover models by entry points, so a program has to import this module. `jrt lm-eval ...` does so,
puts the recall tasks on lm-eval's include path, and is the command `lm_eval ...` in all other respects.
"""

import inspect
import logging
from typing import Any

import torch
from jrt_recall import PROTOCOLS
from jrt_recall.harness import arguments, command_line, settings
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import trange

from jrt.evaluate.likelihood import log_likelihoods
from jrt.evaluate.models import ModelSpec, open_model

logger = logging.getLogger(__name__)

ANSWER_TOKENS = max(protocol.max_new_tokens for protocol in PROTOCOLS.values())

Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("jrt")
class JRTHarness(HFLM):
    """A model of this project for lm-eval.

    Args:
        pretrained: what `jrt.load` takes.
        device, dtype, compat, short_prompt: as in `jrt.load`.
        batch_size: prompts at once; lm-eval's "auto" means 16 for log-likelihoods.
        max_batch_size: accepted because lm-eval always passes it; unused.
        max_length: tokens kept of a prompt with its continuation; None: the length of the training sequences.
    """

    def __init__(
        self,
        pretrained: str,
        device: str = "cpu",
        dtype: str | None = None,
        compat: str | None = None,
        short_prompt: str | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        max_length: int | None = None,
    ) -> None:
        if device.startswith("cuda") and not torch.cuda.is_available():
            logger.warning("no GPU here: computing on the CPU")  # lm-eval asks for cuda:0 unless told otherwise
            device = "cpu"
        opened = open_model(ModelSpec(pretrained, device, dtype, compat, short_prompt))
        if not opened.ours:
            raise ValueError(f"{pretrained} is no model of this project: use --model hf")
        super().__init__(
            pretrained=opened.model,
            tokenizer=opened.tokenizer,
            batch_size=batch_size,
            max_length=None if max_length is None else settings.whole_number("max_length", max_length, least=1),
            backend="causal",
        )

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        pairs = [self._kept(context, continuation) for _, context, continuation in requests]
        size = override_bs or (self.batch_size if isinstance(self.batch_size, int) else 16)
        found: list[tuple[float, bool]] = []
        chunk = 16 * size  # sorted by length within a chunk
        for start in trange(0, len(pairs), chunk, desc="log-likelihoods", unit="chunk", disable=disable_tqdm):
            scored = log_likelihoods(self.model, pairs[start : start + chunk], size)
            found += [(one.log_likelihood, one.is_greedy) for one in scored]
        for (text, _, _), one in zip(requests, found, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, one)
        return found

    def _kept(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens does not fit the {self.max_length} that are kept"
            )
        return context[-room:], continuation


def command(given: list[str]) -> int:
    """Runs `lm_eval` with our models and the recall tasks. given: its command-line arguments. Returns the exit
    status."""
    command_line(arguments(given), _check_model)
    return 0


def _check_model(found: dict[str, Any]) -> None:
    """Raises ValueError for unknown arguments of `--model jrt`, and for a `max_length` that leaves no room for a
    prompt."""
    if found.get("model") != "jrt":
        return
    if found.get("trust_remote_code"):
        raise ValueError("--trust_remote_code: --model jrt never runs code of a checkpoint: leave it out")
    options = settings.as_dict("model_args", found.get("model_args"))
    known = list(inspect.signature(JRTHarness.__init__).parameters)[1:]
    if unknown := [str(name) for name in options if name not in known]:
        raise ValueError(f"--model_args: --model jrt has no {', '.join(unknown)}; expected {', '.join(known)}")
    if twice := sorted({"batch_size", "max_batch_size", "device"} & options.keys()):
        raise ValueError(f"--model_args: {twice[0]} is an option of its own: give --{twice[0]}")
    if not isinstance(options.get("pretrained"), str) or not options["pretrained"]:
        raise ValueError("--model_args: name the model with pretrained=NAME")
    if options.get("max_length") is not None:
        length = settings.whole_number("max_length", options["max_length"], least=1)
        if any(map(settings.is_recall, settings.names_of(found.get("tasks")))) and length <= ANSWER_TOKENS:
            raise ValueError(f"max_length={length} leaves no prompt beside the {ANSWER_TOKENS} new tokens of an answer")
