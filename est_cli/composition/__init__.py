"""From conf/ and the command line to plain values. Only it, runs, experiments and commands import Hydra.

hydra_internals   what Hydra offers only in private modules, in one place
typed_text        keeps the values of text keys as they were typed
composer          composes a command's config and says what is wrong with it, one line a problem
"""
