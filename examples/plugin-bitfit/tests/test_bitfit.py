"""BitFit keeps the promises of an adapter method, on a model with biases and on one without."""

from tunekit.testing import parametrize

from tunekit_bitfit import BitFit


@parametrize(BitFit())
def test_conformance_on_norms(component, check):
    check(component)


@parametrize(BitFit(norms=False), architecture="gpt2")
def test_conformance_on_biases(component, check):
    check(component)
