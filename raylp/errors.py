"""The one exception that is meant for users."""


class UserError(Exception):
    """What is wrong, where, and what to do about it, on one line.

    The command line prints the message and leaves with `exit_code`: 1 when work failed, 2 for wrong usage, a wrong
    recipe or wrong resources. Nothing else than this type reaches the screen without a traceback.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code
