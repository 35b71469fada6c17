"""For the tests of tunekit and of its plugins: tiny models and tokenizers built in memory, and the conformance kit.

    from tunekit.testing import parametrize

    @parametrize(MyMethod(), MyMethod(size=8))
    def test_conformance(component, check):
        check(component)

Each check is a test of its own, `my-method-base_is_frozen`; outside of pytest, `check_component(MyMethod())` returns
records. Nothing is downloaded, and no GPU is needed.
"""

from tunekit.testing.kit import Check as Check
from tunekit.testing.kit import Record as Record
from tunekit.testing.kit import check_component as check_component
from tunekit.testing.kit import checks_for as checks_for
from tunekit.testing.kit import parametrize as parametrize
from tunekit.testing.tiny import CHATML as CHATML
from tunekit.testing.tiny import tiny_model as tiny_model
from tunekit.testing.tiny import tiny_tokenizer as tiny_tokenizer
