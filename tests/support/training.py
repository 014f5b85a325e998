"""Conversions for the tests of training."""

import normswap

METHODS = ["cn", "cn-x", "acn", "selfnorm", "crossnorm", "cnsn"]


def convert(model, method, **settings):
    if takes_context(method):
        settings.setdefault("contexts", 3)
    return normswap.convert(model, method, verify=False, **settings)


def takes_context(method):
    return normswap.get_method(method).needs_context
