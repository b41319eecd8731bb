"""Where bytes lie: a local folder, a URL, a cache, memory."""
