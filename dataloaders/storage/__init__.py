"""Where bytes are: a local folder, a URL, a cache, memory.

base.py           where bytes are: files by name under a root
homes.py          where indexes and fetched files may lie, and which of those places are trusted
remote.py         files behind URLs
whole_folder.py   a folder that appears whole or not at all
cache.py          shards and .beton files fetched from a URL
memory.py         shards that pass through memory, each whole, and are read there
"""
