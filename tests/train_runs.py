"""Small training runs for tests. Configurations are composed as on the command line; the data is made once."""

import csv
from pathlib import Path

import hydra
from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "train" / "configs"


def composed(*overrides: str, hydra_too: bool = False) -> DictConfig:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose("config", list(overrides), return_hydra_config=hydra_too)


def trained(data: Path, output: Path, *overrides: str) -> dict[str, float]:
    """Runs the debug experiment in this process and returns its last metrics."""
    from train.run import train

    return train(composed("experiment=debug", f"output={output}", f"data.folder={data}", "export=false", *overrides))


def curve(output: Path) -> list[tuple[str, ...]]:
    """Step, losses, rate and gradient norm of each row of metrics.csv, digit for digit."""
    names = ("step", "train/loss", "train/masked", "train/rate", "train/gradient_norm", "validation/loss")
    with (output / "metrics.csv").open(newline="") as file:
        return [tuple(row[name] for name in names) for row in csv.DictReader(file)]
