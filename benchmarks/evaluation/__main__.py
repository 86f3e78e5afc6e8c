"""`python -m benchmarks.evaluation`: the same as `faasmoe bench`."""

import sys

from benchmarks.evaluation.command import main

sys.exit(main())
