"""The recall tasks inside stock lm-eval.

`hooks` and `super_glue` hold the functions that the task files call. `command` is the command `jrt-recall`, `settings`
refuses options that would contradict a protocol, and `repeat` shows the context of any other lm-eval task N times."""

from .command import arguments, command_line, full_name, main

__all__ = ["arguments", "command_line", "full_name", "main"]
