"""Run the `minerva` command as `python -m minerva_native`."""

import sys

from minerva_command import main

sys.exit(main())
