"""Wraps a hook, as if it could change what the others see."""

import tunekit


@tunekit.hookimpl(wrapper=True)
def tunekit_log():
    return (yield)
