# SPDX-License-Identifier: MIT
"""The one error of all commands."""


class UserError(Exception):
    """What the user can put right: one message that says how.

    ``status`` is the HTTP status where a page is told, as play's is.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
