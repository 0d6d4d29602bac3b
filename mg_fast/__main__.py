"""python -m mg_fast: the same as the mg-fast command."""

import sys

from .cli import main

sys.exit(main())
