"""Where samples are: packed and foreign WebDataset shards, image folders; local or behind a URL."""
