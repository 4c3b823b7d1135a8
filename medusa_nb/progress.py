"""One progress bar for terminal and notebook, silent when a notebook runs unattended."""

import os

from tqdm.auto import tqdm

HEADLESS = "MEDUSA_NB_HEADLESS"


def is_headless() -> bool:
    """True when nobody is watching: ``medusa_nb.run`` sets this for the kernels it starts."""
    return os.environ.get(HEADLESS) == "1"


def progress(total: int, unit: str, description: str, initial: int = 0) -> tqdm:
    """A tqdm bar over ``total`` units."""
    return tqdm(total=total, initial=initial, unit=unit, desc=description, disable=is_headless())
