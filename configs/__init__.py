"""Run pages: runs/*.toml, one page each."""
