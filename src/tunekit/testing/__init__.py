"""For the tests of tunekit and of its plugins: tiny models and tokenizers built in memory, and the conformance kit."""

from tunekit.testing.tiny import CHATML as CHATML
from tunekit.testing.tiny import tiny_model as tiny_model
from tunekit.testing.tiny import tiny_tokenizer as tiny_tokenizer
