"""One small file a command: compose, validate, call."""
