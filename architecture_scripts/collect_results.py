"""Prints Table 2 from the runs in a folder:

`python collect_results.py RUNS [--output FOLDER]` is `jrt report RUNS --layout table2`.
"""

import sys

from jrt.cli import main

sys.exit(main(["report", "--layout", "table2", *sys.argv[1:]]))
