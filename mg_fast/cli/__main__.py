"""python -m mg_fast.cli: the same as the mg-fast command."""

import sys

from . import main

sys.exit(main())
