"""`jrt doctor`: what is installed, whether the backends of the ops compute what they should, and what a model gets wrong."""

from jrt.doctor.examination import Examination, examine
from jrt.doctor.installed import Installation, inspect_installation

__all__ = ["Examination", "Installation", "examine", "inspect_installation"]
