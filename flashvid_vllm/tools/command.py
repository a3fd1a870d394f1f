# SPDX-License-Identifier: MIT
"""What the commands have in common: help written by hand, so that it fits a screen, and errors of one line."""

import argparse
from typing import NoReturn

from ..serving.cli import number


class Parser(argparse.ArgumentParser):
    """A parser with the help that it is given: at most 24 lines of 80 characters, two examples among them."""

    def __init__(self, prog: str, text: str) -> None:
        super().__init__(prog=prog, allow_abbrev=False)
        self._text = text

    def format_help(self) -> str:
        return self._text.strip() + "\n"

    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def count(text: str, least: int = 1) -> int:
    """A whole number of at least ``least``, for argparse."""
    value = int(number(int)(text))
    if value < least:
        raise argparse.ArgumentTypeError(f"must be {least} or more, got {value}")
    return value
