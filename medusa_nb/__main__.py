"""``python -m medusa_nb COMMAND``, the same as ``medusa-nb COMMAND``."""

import sys

from medusa_nb.cli import main

if __name__ == "__main__":
    sys.exit(main())
