"""Checkpoints: weight files are read safely (`files`), their tensors renamed by tables (`keys`), models loaded
(`load`), converted (`convert`) and written with their source code (`self_contained`). `names` finds the folder behind a
name."""
