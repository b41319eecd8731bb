"""Commands, ranks and elastic runs as tests start them; ships with the package for users' own tests."""
