"""Writes small models with random weights as folders, for tests of the evaluation."""

import dataclasses
from pathlib import Path

import torch
from jrt_recall.tokenizers import shipped_tokenizer

from jrt import JRTConfig, JRTForCausalLM, presets


def save_random_model(folder: Path, pattern: str = "CPSLAM", seed: int = 0, train_length: int = 128) -> str:
    """Saves a model of the debug size with the shipped tokenizer; returns the folder as `--model` takes it."""
    torch.manual_seed(seed)
    config = dataclasses.replace(presets()["debug"], pattern=pattern, train_length=train_length)
    JRTForCausalLM(JRTConfig(architecture=config.to_dict(), eos_token_id=0, pad_token_id=1)).save_pretrained(folder)
    shipped_tokenizer().save_pretrained(folder)
    return str(folder)
