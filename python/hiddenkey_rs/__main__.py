"""``python -m hiddenkey_rs`` is ``hiddenkey``."""

import sys

from .cli.main import main

sys.exit(main())
