"""`python -m jrt`."""

import sys

from jrt.cli import main

sys.exit(main())
