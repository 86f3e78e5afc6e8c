"""`python -m emulated.sandbox`: a sandbox whose cuda is the emulated device."""

import sys

from emulated.cuda import install

if __name__ == "__main__":
    install()
    from faasmoe_expert.__main__ import main

    sys.exit(main())
