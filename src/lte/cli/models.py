"""What the commands that load models share."""

from __future__ import annotations

from transformers.utils import logging


def quiet_transformers() -> None:
    """Leaves the terminal to our own messages and progress bars."""
    # Not set_verbosity_error, which makes Trainer print dicts in place of its progress bar.
    logging.set_verbosity_warning()
    logging.get_logger("transformers.trainer_utils").setLevel(logging.ERROR)
    logging.disable_progress_bar()
