"""The one error of this package."""


class WeightsError(ValueError):
    """A model that cannot be loaded. The message is one line, for the person who named the model."""
