"""`python -m mg_fast` does the same as the command `mg-fast`."""

import sys

from .cli import main

sys.exit(main())
