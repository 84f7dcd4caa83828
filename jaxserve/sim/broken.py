"""How a law says that it is broken."""


class Broken(AssertionError):
    """An invariant does not hold. Attributes: law: its number."""

    def __init__(self, law: str, message: str) -> None:
        super().__init__(f"{law}: {message}")
        self.law = law
