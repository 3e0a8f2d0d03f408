"""Token shards: their tars and index, making them, verifying them."""
