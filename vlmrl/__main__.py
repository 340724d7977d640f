"""`python -m vlmrl`."""

import sys

from vlmrl.cli import main

sys.exit(main())
