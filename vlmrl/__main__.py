"""`python -m vlmrl`."""

import sys

from vlmrl.cli.main import main

sys.exit(main())
