"""`python -m mg_fast.cli` does the same as the command `mg-fast`."""

import sys

from . import main

sys.exit(main())
