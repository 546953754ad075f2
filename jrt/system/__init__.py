"""What the package needs of its surroundings: files, errors of other projects' code, versions, the processor."""
