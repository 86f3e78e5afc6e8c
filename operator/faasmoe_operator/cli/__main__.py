"""`python -m faasmoe_operator.cli`: the same as `faasmoe`."""

import sys

from faasmoe_operator.cli.command import main

sys.exit(main())
