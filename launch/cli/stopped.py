"""What Ctrl-C leaves: one line and an exit code. It imports nothing, as Ctrl-C may come during imports."""

STOPPED = "stopped by Ctrl-C"
STOPPED_CODE = 130  # 128 + SIGINT
