"""Run configs: runs/*.toml, one run each; pages of sweeps: sweeps/*.toml."""
