"""`python -m dino_fast` is the `dino-fast` command."""

import sys

from dino_fast.cli.main import main

sys.exit(main())
