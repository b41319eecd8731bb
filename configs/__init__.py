"""Run configs: runs/*.toml, one run each; sweep configs: sweeps/*.toml."""
