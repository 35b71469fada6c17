"""An observer that asks for an argument the hook does not have."""

import tunekit


@tunekit.hookimpl
def tunekit_log(run, stage):
    """Never called."""
