"""Text: tokenizer, streamed text, stop strings and chat templates."""

from jaxserve.text.chat import ChatTemplate, TemplateBusyError, TemplateError, TemplateLimits, TemplatePool
from jaxserve.text.detokenize import Detokenizer
from jaxserve.text.stop import StopStrings
from jaxserve.text.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "Detokenizer",
    "StopStrings",
    "TemplateBusyError",
    "TemplateError",
    "TemplateLimits",
    "TemplatePool",
    "Tokenizer",
]
