"""``python -m kedit``."""

import sys

from kedit.cli import main

sys.exit(main())
