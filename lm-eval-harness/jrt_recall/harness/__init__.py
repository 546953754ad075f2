"""The recall tasks inside stock lm-eval: what the task files call (`hooks`, `super_glue`), and the command `jrt-recall`
(`command`) with what it refuses (`settings`) and with any other task's context shown N times (`repeat`)."""

from .command import arguments, command_line, full_name, main

__all__ = ["arguments", "command_line", "full_name", "main"]
