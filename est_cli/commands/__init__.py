"""One file per command; `entry` has what they share: flags, composition, help, exit codes."""
