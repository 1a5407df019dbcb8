"""Published configs; each file is one experiment."""
