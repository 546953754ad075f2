"""Prints Table 1 from the runs in a folder:

`python collect_results.py RUNS [--output FOLDER]` is `jrt report RUNS --layout table1`.
"""

import sys

from jrt.cli import main

sys.exit(main(["report", "--layout", "table1", *sys.argv[1:]]))
