"""`python -m vivace.cli` is `vivace`."""

import sys

from vivace.cli import main

sys.exit(main())
