"""What a person, a logger or a metric sees of a compression."""
