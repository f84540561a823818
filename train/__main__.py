"""`python -m videofactory_train`, by which `accelerate launch -m` starts the command in every process."""

import sys

from .cli import main

sys.exit(main())
