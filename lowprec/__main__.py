"""`python -m lowprec` is the same as `lowprec`."""

import sys

from lowprec.cli import main

sys.exit(main())
