"""Run configs: runs/*.toml, one run each."""
