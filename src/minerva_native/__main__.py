"""Run the `minerva` command as `python -m minerva_native`."""

import sys

from .cli import main

sys.exit(main())
