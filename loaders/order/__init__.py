"""Which sample stands at which position: arithmetic on manifests, no I/O."""
