"""``python -m jaxtransfer``."""

import sys

from jaxtransfer.cli import main

sys.exit(main())
