"""Misspells a hook."""

import tunekit


@tunekit.hookimpl
def tunekit_component():
    return []
