"""Entry point of `python -m faasmoe_operator.cli`, equivalent to `faasmoe`."""

import sys

from faasmoe_operator.cli.command import main

sys.exit(main())
