"""Runs transformers' own common model tests on our models.

These tests are in transformers' source distribution, not in the installed package, so they are fetched for the
installed version. The distribution lacks the mixins for generation and export; empty classes replace them.
"""

import copy
import importlib
import re
import subprocess
import sys
import tarfile
import types
import unittest

import pytest
import torch
import transformers

from jrt import Config, JRTConfig, JRTForCausalLM

pytestmark = pytest.mark.slow
PATTERNS = ("CL", "MM", "AS", "CP")
PACKAGE = "transformers_source_tests"


@pytest.fixture(scope="session")
def common_tests(tmp_path_factory, pytestconfig) -> types.ModuleType:
    """The module `test_modeling_common` of the installed version."""
    folder = tmp_path_factory.mktemp("transformers")
    version = transformers.__version__
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*download, "--no-binary", ":all:", "--dest", str(folder), f"transformers=={version}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"the source of transformers {version} could not be fetched: {done.stderr.strip()[-200:]}")
    with tarfile.open(next(folder.glob("transformers-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    source = folder / f"transformers-{version}" / "tests"
    for marker in set(re.findall(r"\bmark\.(\w+)", (source / "test_modeling_common.py").read_text())):
        pytestconfig.addinivalue_line("markers", f"{marker}: of transformers")
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(source)]
    sys.modules[PACKAGE] = package
    for missing, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        parent, name = missing.split(".")
        sys.modules[f"{PACKAGE}.{parent}"] = types.ModuleType(f"{PACKAGE}.{parent}")
        module = types.ModuleType(f"{PACKAGE}.{missing}")
        setattr(module, mixin, type(mixin, (), {}))
        sys.modules[f"{PACKAGE}.{parent}.{name}"] = module
    return importlib.import_module(f"{PACKAGE}.test_modeling_common")


class ModelTester:
    """What the common tests ask of a model's tester: a small configuration and inputs for it."""

    batch_size, seq_length, is_training = 3, 7, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 2, 99

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern

    def get_config(self) -> JRTConfig:
        core = Config(
            pattern=self.pattern,
            width=self.hidden_size,
            vocab_rows=self.vocab_size,
            heads=self.num_attention_heads,
            linear_heads=2,
            feature_dim=8,
            rotary_dim=8,
            window=3,
            mlp_width=48,
            enc_length=4,
        )
        return JRTConfig(architecture=core.to_dict(), bos_token_id=0, eos_token_id=1, pad_token_id=2)

    def prepare_config_and_inputs_for_common(self) -> tuple[JRTConfig, dict[str, torch.Tensor]]:
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def with_labels(self: unittest.TestCase, inputs: dict, model_class: type, return_labels: bool = False) -> dict:
    """The common tests give labels to the classes of transformers only."""
    inputs = copy.deepcopy(inputs)
    return inputs | ({"labels": inputs["input_ids"].clone()} if return_labels else {})


def suite_of(common: types.ModuleType, pattern: str) -> unittest.TestSuite:
    """The common tests of one pattern."""
    mixins = (common.ModelTesterMixin, common.GenerationTesterMixin)
    settings = {
        "all_model_classes": (JRTForCausalLM,),
        "has_attentions": False,
        "setUp": lambda self: setattr(self, "model_tester", ModelTester(pattern)),
        "_prepare_for_class": with_labels,
    }
    case = type(f"TestCommon{pattern}", (*mixins, unittest.TestCase), settings)
    return unittest.defaultTestLoader.loadTestsFromTestCase(case)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_common_tests_of_transformers_pass(pattern, common_tests):
    result = unittest.TestResult()
    suite = suite_of(common_tests, pattern)
    suite.run(result)
    failed = [
        f"{test.id().rsplit('.', 1)[-1]}: {text.strip().splitlines()[-1]}"
        for test, text in (*result.failures, *result.errors)
    ]
    assert result.testsRun - len(result.skipped) >= 40, "too few of the common tests ran"
    assert not failed, "\n".join([f"{len(failed)} of {result.testsRun} failed, {len(result.skipped)} skipped", *failed])
