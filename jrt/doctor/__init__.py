"""`jrt doctor`: reports what is installed, whether the backends of `jrt.ops` are correct here, and what a model gets
wrong."""

from jrt.doctor.examination import Examination, examine
from jrt.doctor.installed import Installation, inspect_installation

__all__ = ["Examination", "Installation", "examine", "inspect_installation"]
