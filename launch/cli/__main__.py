"""`python -m launch.cli` is `setformer`."""

from launch.cli.main import main

main()
